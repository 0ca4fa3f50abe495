"""Details: what an answer tells beside its tokens, for requests that ask: the likeliest tokens at each step, and where
the model looked.

Knows rows and steps; knows no rule of the search. R requests, K hypotheses each, M steps, S source positions, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.decoding.best import best_candidates
from seqmodels.decoding.params import TOP_LOGPROBS, SearchParams
from seqmodels.record import Record

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Details(Record):
    """What each row gave at each step. A column is written where the rows stood and is never moved, so that a step
    costs the same however much is written; `parents` lead from a hypothesis back to the rows it came through.

    Tables that nobody in the lane asks for are None.
    """

    parents: Tensor  # (R, K, M) the row that each live hypothesis continued at this step
    count: Tensor  # (R,) top_logprobs of each request
    top_tokens: Tensor | None  # (R, K, M, TOP_LOGPROBS)
    top_logprobs: Tensor | None  # (R, K, M, TOP_LOGPROBS)
    attentions: Tensor | None  # (R, K, M, S)
    mask: Tensor | None  # (R, S) the source's real positions

    @classmethod
    def begin(cls, params: Sequence[SearchParams], mask: Tensor | None) -> "Details | None":
        """For requests of one lane, who ask for the same tables; None where that is for none. mask: the memory's."""
        top, attentions = params[0].top_logprobs > 0, params[0].output_attentions
        if not top and not attentions:
            return None
        shape = (len(params), params[0].width, max(p.max_new_tokens for p in params))
        return cls(
            parents=torch.zeros(shape, dtype=torch.int64),
            count=torch.tensor([p.top_logprobs for p in params]),
            top_tokens=torch.zeros(*shape, TOP_LOGPROBS, dtype=torch.int64) if top else None,
            top_logprobs=torch.zeros(*shape, TOP_LOGPROBS) if top else None,
            attentions=torch.zeros(*shape, mask.shape[1]) if attentions and mask is not None else None,
            mask=mask if attentions else None,
        )

    def trimmed(self, room: int) -> "Details":
        """The same with room for so many tokens."""
        tables = {name: x[:, :, :room] for name, x in vars(self).items() if isinstance(x, Tensor) and x.dim() > 2}
        return self.changed(**tables)

    def write(self, step: Tensor, parents: Tensor, logprobs: Tensor, weights: Tensor | None) -> None:
        """What the rows gave at a step (R,), in place: what is not yet written is nobody's.

        parents (R, K), logprobs (R, K, V), weights (R, K, S) of the attention.
        """
        at = torch.arange(len(step), device=step.device), slice(None), step
        self.parents[at] = parents
        if self.top_tokens is not None and self.top_logprobs is not None:
            each = logprobs.flatten(0, 1)[:, None]
            values, tokens = best_candidates(each.new_zeros(len(each), 1), each, TOP_LOGPROBS)
            missing = TOP_LOGPROBS - values.shape[1]  # of a small vocabulary
            self.top_logprobs[at] = F.pad(values, (0, missing), value=NEG_INF).view(*parents.shape, -1)
            self.top_tokens[at] = F.pad(tokens, (0, missing)).view(*parents.shape, -1)
        if self.attentions is not None:
            assert weights is not None, "a request for attentions is refused where the model has none"
            self.attentions[at] = weights

    def rows(self, request: int, last: int, length: int) -> list[int]:
        """The rows that a hypothesis came through, step by step. last: the one that gave it the last of its tokens."""
        parents = self.parents[request, :, :length].T.tolist()
        rows = [last]
        for step in reversed(range(length - 1)):
            rows.append(parents[step][rows[-1]])
        return rows[::-1]

    def top_logprobs_of(
        self, request: int, rows: Sequence[int], first: int = 0
    ) -> list[list[tuple[int, float]]] | None:
        """For each step, of those from `first`, the likeliest tokens and their log-probabilities, best first; without
        those at -inf."""
        if self.top_tokens is None or self.top_logprobs is None:
            return None
        count, steps = int(self.count[request]), list(range(first, first + len(rows)))
        tokens = self.top_tokens[request, rows, steps, :count].tolist()
        values = self.top_logprobs[request, rows, steps, :count].tolist()
        return [
            [(token, value) for token, value in zip(*step, strict=True) if value > NEG_INF]
            for step in zip(tokens, values, strict=True)
        ]

    def attentions_of(self, request: int, rows: Sequence[int]) -> list[list[float]] | None:
        """For each step the weights over the source's real positions."""
        if self.attentions is None or self.mask is None:
            return None
        weights = self.attentions[request, rows, list(range(len(rows)))]  # (T, S)
        return [list(step) for step in weights[:, self.mask[request]].tolist()]
