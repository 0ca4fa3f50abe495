"""Pooling: what the linear layer of a classifier or tagger reads of an encoder's steps, which may come in pieces.

Each is called as pool(memory, before (B, W)) -> (features, after (B, W)), where `before` is what it carries from the
steps in front of these, or `start(B)`, and `after` what it carries on. Knows no encoder and no label.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import Pooling
from seqmodels.state import Memory

Pooled = tuple[Tensor, Tensor]


class Steps(nn.Module):
    """Every step as it is, for taggers: (B, S, D)."""

    def start(self, rows: int) -> Tensor:
        return torch.zeros(rows, 0)

    def forward(self, memory: Memory, before: Tensor) -> Pooled:
        return memory.values, before


class Last(nn.Module):
    """What the encoder knows at its end (B, D), which its own state carries."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def start(self, rows: int) -> Tensor:
        return torch.zeros(rows, 0)

    def forward(self, memory: Memory, before: Tensor) -> Pooled:
        return memory.summary, before


class Max(nn.Module):
    """The largest of each feature (B, D), so far."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def start(self, rows: int) -> Tensor:
        return torch.full((rows, self._size), float("-inf"))

    def forward(self, memory: Memory, before: Tensor) -> Pooled:
        largest = memory.values.masked_fill(~memory.mask[:, :, None], float("-inf")).amax(1)
        after = torch.maximum(before, largest)
        return after, after


class Mean(nn.Module):
    """The mean (B, D). Carries the sum and, in the last column, the number of steps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def start(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._size + 1)

    def forward(self, memory: Memory, before: Tensor) -> Pooled:
        values = memory.values.float().masked_fill(~memory.mask[:, :, None], 0)
        total = _added(before[:, :-1], values)
        count = before[:, -1:] + memory.mask.sum(1, keepdim=True)
        return total / count, torch.cat([total, count], dim=1)


class Attention(nn.Module):
    """The mean (B, D) by softmax of a score for each step. Carries the log of the sum of all exp(score), then the mean
    so far: what came before is weighed like one step with that score, so the last bits depend on the cuts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        scorer = nn.Linear(size, 1)
        self.weight, self.bias, self._size = scorer.weight, scorer.bias, size

    def start(self, rows: int) -> Tensor:
        return F.pad(torch.full((rows, 1), float("-inf")), (0, self._size))

    def forward(self, memory: Memory, before: Tensor) -> Pooled:
        scores = F.linear(memory.values, self.weight, self.bias)[:, :, 0].float()  # under autocast too
        scores = scores.masked_fill(~memory.mask, float("-inf"))
        values = memory.values.masked_fill(~memory.mask[:, :, None], 0)
        mean = (scores.softmax(1)[:, :, None] * values).sum(1)
        both = torch.stack([before[:, 0], scores.logsumexp(1)], dim=1)  # (B, 2)
        shares = both.softmax(1)
        mean = shares[:, :1] * before[:, 1:] + shares[:, 1:] * mean
        return mean, torch.cat([both.logsumexp(1, keepdim=True), mean], dim=1)


POOLS: dict[Pooling, type[Last | Max | Mean | Attention]] = {
    "last": Last,
    "mean": Mean,
    "max": Max,
    "attention": Attention,
}


Pool = Steps | Last | Max | Mean | Attention


def _added(total: Tensor, values: Tensor) -> Tensor:
    """total (B, D) + values (B, S, D), step after step on a CPU: sums in one order have the same bits wherever the
    steps are cut, which those of `sum` do not."""
    if total.is_cuda:
        return total + values.sum(1)
    everywhere = torch.zeros(values.shape[1], dtype=torch.int64)
    return total[:, None].index_add(1, everywhere, values)[:, 0]
