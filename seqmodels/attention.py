"""Attention: queries x Memory -> (context, weights).

Knows the scoring functions (Luong et al. 2015: dot, general; Bahdanau et al. 2015: additive); does not know whether
the T queries are the steps of one target or the K beams of one request: both share one un-copied memory row.
"""

import math

import torch
from torch import Tensor, nn

from seqmodels.config import AttentionKind
from seqmodels.state import Memory

QUERIES_AT_ONCE = 16


class Attention(nn.Module):
    """(queries (B, T, H), Memory with S positions of D features) -> (context (B, T, D), weights (B, T, S))."""

    def __init__(self, kind: AttentionKind, query_size: int, memory_size: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "general":
            self.project_keys = nn.Linear(memory_size, query_size, bias=False)
        elif kind == "additive":
            self.project_keys = nn.Linear(memory_size, query_size, bias=False)
            self.project_query = nn.Linear(query_size, query_size)
            self.energy = nn.Parameter(torch.empty(query_size).uniform_(-1, 1) / math.sqrt(query_size))

    def prepare(self, memory: Memory) -> Memory:
        """Project the keys once, so that no step does it again."""
        keys = memory.values if self.kind == "dot" else self.project_keys(memory.values)
        return memory.changed(keys=keys, bias=padding_bias(memory.mask, keys.dtype))

    def query(self, outputs: Tensor) -> Tensor:
        """What a decoder's outputs (..., H) ask: row-wise, so a search does it for all its rows at once."""
        return self.project_query(outputs) if self.kind == "additive" else outputs

    def forward(self, queries: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        assert memory.keys is not None and memory.bias is not None, "call Attention.prepare before a memory's first use"
        if self.kind == "additive":
            # A few queries at a time: all at once, (B, T, S, H) would take gigabytes for long texts, which training
            # needs all the same, for its gradients.
            energies = [self._energies(some, memory.keys) for some in torch.split(queries, QUERIES_AT_ONCE, 1)]
            scores = torch.cat(energies, 1) + memory.bias
        else:
            scores = torch.baddbmm(memory.bias, queries, memory.keys.mT)  # (B, T, S)
        weights = scores.softmax(-1)
        return torch.bmm(weights, memory.values), weights

    def _energies(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries (B, T, H), keys (B, S, H) -> scores (B, T, S)."""
        seen = torch.tanh(queries[:, :, None] + keys[:, None])
        if torch.is_grad_enabled():
            return seen @ self.energy
        return seen.mul_(self.energy).sum(-1)  # the product above gives a score other bits by how many there are


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask (B, S) -> (B, 1, S): what scores get added, so that padding gets no weight."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))[:, None]
