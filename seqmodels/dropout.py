"""Dropout: with a mask of its own for each step, or one that all steps of a row share; of numbers, or of whole words.

Every mask is drawn from torch's global generator, whose state a training run saves and restores.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def dropout(x: Tensor, rate: float, training: bool, locked: bool = False) -> Tensor:
    """x (B, T, D). locked: what is dropped is dropped at all steps of a row (Gal and Ghahramani 2016)."""
    if not locked:
        return F.dropout(x, rate, training)
    return x * locked_mask(x, rate) if training and rate > 0 else x


def locked_mask(x: Tensor, rate: float) -> Tensor:
    """For x (B, T, D) a factor (B, 1, D): 0 with the given probability, else 1 / (1 - rate)."""
    return F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), rate)


def embed(tokens: Tensor, table: nn.Embedding, rate: float, training: bool) -> Tensor:
    """Tokens (B, T) -> embeddings (B, T, D). A word that is dropped is 0 at all its places, and the others are scaled
    by 1 / (1 - rate): Gal and Ghahramani 2016, as in Merity et al. 2018."""
    embedded: Tensor = table(tokens)
    if not (training and rate > 0):
        return embedded
    words = F.dropout(table.weight.new_ones(len(table.weight), 1), rate)
    return embedded * F.embedding(tokens, words)
