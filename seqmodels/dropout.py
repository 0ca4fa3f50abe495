"""Dropout: with a mask of its own for each step, or one that all steps of a row share.

Every mask is drawn from torch's global generator, whose state a training run saves and restores.
"""

from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, rate: float, training: bool, locked: bool = False) -> Tensor:
    """x (B, T, D). locked: what is dropped is dropped at all steps of a row (Gal and Ghahramani 2016)."""
    if not locked:
        return F.dropout(x, rate, training)
    return x * locked_mask(x, rate) if training and rate > 0 else x


def locked_mask(x: Tensor, rate: float) -> Tensor:
    """For x (B, T, D) a factor (B, 1, D): 0 with the given probability, else 1 / (1 - rate)."""
    return F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), rate)
