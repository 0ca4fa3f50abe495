"""How words are spelt, for a tagger that meets words it has never seen (Ling et al. 2015; Lample et al. 2016).

A spelling is read as UTF-8 bytes, so there is no alphabet to learn or to save, and any language can be written in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import CharacterConfig
from seqmodels.recurrent import Recurrent

NO_BYTE = 0  # byte b of a spelling is number b + 1


def with_spellings(ids: Sequence[int], last: Sequence[int], words: Sequence[str], max_length: int) -> Tensor:
    """Token ids (S,) -> (S, 1 + max_length) of int64: each id, and how the whole word is spelt that it is a piece of.

    last: the place of each word's last piece, as `Tokenizer.encode_words` tells it; words cut off the end have none.
    """
    table = torch.full((len(ids), 1 + max_length), NO_BYTE)
    table[:, 0] = torch.tensor(ids)
    first = 0
    for word, end in zip(words, [*last, len(ids) - 1], strict=False):
        spelt = _shortened(word.encode(), max_length)
        table[first : end + 1, 1 : 1 + len(spelt)] = torch.tensor(list(spelt)) + 1
        first = end + 1
    return table


def _shortened(spelt: bytes, max_length: int) -> bytes:
    """Beginning and end of what is too long: most of what a form tells stands there."""
    if len(spelt) <= max_length:
        return spelt
    return spelt[: max_length // 2] + spelt[len(spelt) - (max_length - max_length // 2) :]


class CharacterEncoder(nn.Module):
    """Spellings (B, S, L) -> what a recurrent layer knows of each after its last byte, and backwards: (B, S, 2·H)."""

    def __init__(self, config: CharacterConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + 256, config.embedding_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)
        self.recurrent = Recurrent("lstm", config.embedding_size, config.hidden_size, bidirectional=True)
        self.output_size = self.recurrent.output_size

    def forward(self, spellings: Tensor) -> Tensor:
        if not self.training:  # where a word's numbers must not depend on how many others there are
            return self._read(spellings)
        different, places = torch.unique(spellings.flatten(0, 1), dim=0, return_inverse=True)
        # A lookup, since the gradient of `read[places]` is summed in any order where there are several threads.
        return F.embedding(places, self._read(different[:, None])[:, 0]).view(*spellings.shape[:2], -1)

    def _read(self, spellings: Tensor) -> Tensor:
        lengths = (spellings != NO_BYTE).sum(2).clamp(min=1)  # padding in a row's end is spelt with one NO_BYTE
        spelt = spellings[:, :, : int(lengths.max())].flatten(0, 1)  # (B·S, L)
        values, _ = self.recurrent(self.embedding(spelt), lengths.flatten())
        half = self.recurrent.hidden_size
        last = values[torch.arange(len(values), device=values.device), lengths.flatten() - 1]
        return torch.cat([last[:, :half], values[:, 0, half:]], dim=1).view(*spellings.shape[:2], -1)
