"""One step of the search for every request of a lane. Knows tokens and log-probabilities; knows no model, no text,
no HTTP.

`Beams` is beam search; `Samples` is greedy search and sampling, where the K outputs of a request do not compete. Both
are records of tensors with the request on axis 0, so that joining is `concat` and leaving is `select`. The rules are
those of DESIGN section 4; tests hold them to a brute-force search and to one written in plain Python.

R requests, K hypotheses each, V vocabulary, M token positions (prefix and generated), S source positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from torch import Tensor

from seqmodels.decoding.best import best_candidates
from seqmodels.decoding.constraints import Constraints, Standing
from seqmodels.decoding.coverage import Coverage
from seqmodels.decoding.details import Details
from seqmodels.decoding.history import History
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.random import gumbel
from seqmodels.decoding.saved import SavedState
from seqmodels.record import Record

FinishReason = Literal["eos", "length", "stop", "constraint"]
REASONS: tuple[FinishReason, ...] = ("eos", "length", "stop", "constraint")
EOS_REASON, LENGTH, STOP, CONSTRAINT = range(4)
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Hypothesis:
    """A finished output. tokens include the prefix and the EOS, if it ended with one.

    logprobs: nats of each generated token. score: their sum divided by length ** length_penalty, and the coverage
    penalty, which is at most 0, where one was asked for. For each generated token, where they were asked for:
    top_logprobs, the likeliest tokens and their nats, best first; attentions, the weights over the source's positions.
    state: for a later request to go on from; None where it was not asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    score: float
    finish_reason: FinishReason
    top_logprobs: list[list[tuple[int, float]]] | None = None
    attentions: list[list[float]] | None = None
    state: SavedState | None = None

    @property
    def generated(self) -> list[int]:
        """The tokens after the prefix."""
        return self.tokens[len(self.tokens) - len(self.logprobs) :]


@dataclass(frozen=True)
class Search(Record):
    """What beams and samples have in common."""

    tokens: Tensor  # (R, K, M) prefix, then generated
    logprobs: Tensor  # (R, K, M) of the generated ones, at the same positions
    scores: Tensor  # (R, K) sum of logprobs; -inf where there is no hypothesis
    last_tokens: Tensor  # (R, K) what the model reads next
    prefix_length: Tensor  # (R,)
    length: Tensor  # (R,) tokens generated so far
    max_length: Tensor  # (R,) max_new_tokens
    penalty: Tensor  # (R, L) length ** length_penalty, by length: a table, so that every device divides by the same
    finished: Tensor  # (R,) bool
    details: Details | None  # where the lane's requests ask for some

    @property
    def history(self) -> History:
        return History(self.tokens, self.prefix_length + self.length, self.length)

    def trimmed(self, room: int) -> Self:
        """Tables cut to `room` positions, since each step may gather all that they hold."""
        tables = {name: x[:, :, :room] for name, x in vars(self).items() if isinstance(x, Tensor) and x.dim() > 2}
        return self.changed(**tables, details=self.details and self.details.trimmed(room))

    def wants_all(self, standing: Standing | None) -> bool:
        """Whether `advance` has to be given the log-probabilities of the whole vocabulary."""
        return standing is not None or (self.details is not None and self.details.top_tokens is not None)

    def normalised(self, scores: Tensor) -> Tensor:
        """scores (R, X) of hypotheses that are `length` tokens long -> divided by the length penalty."""
        return scores / self.penalty.gather(1, self.length[:, None])

    def _written(self, tokens: Tensor, logprobs: Tensor, new: Tensor, of_new: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of our tables (R, K, M) with the new tokens and their logprobs (R, K) at the next position of each."""
        position = (self.prefix_length + self.length)[:, None, None].expand(-1, new.shape[1], 1)
        return tokens.scatter_(2, position, new[:, :, None]), logprobs.scatter_(2, position, of_new[:, :, None])

    def _hypothesis(
        self, request: int, tokens: Tensor, logprobs: Tensor, length: int, score: float, reason: Tensor, last: int
    ) -> Hypothesis:
        """A finished one: tokens and logprobs (M,). last: the row that gave it the last of its tokens."""
        prefix = int(self.prefix_length[request])
        found = Hypothesis(
            tokens[: prefix + length].tolist(),
            logprobs[prefix : prefix + length].tolist(),
            score,
            REASONS[int(reason)],
        )
        if self.details is None:
            return found
        rows = self.details.rows(request, last, length)
        return replace(
            found,
            top_logprobs=self.details.top_logprobs_of(request, rows),
            attentions=self.details.attentions_of(request, rows),
        )


@dataclass(frozen=True)
class Candidates:
    """Continuations of live hypotheses, best first. All tensors (R, C).

    totals: sum of logprobs with the new token's. parents: the hypothesis that each one continues. tokens, logprobs:
    the new token and its own log-probability.
    """

    totals: Tensor
    parents: Tensor
    tokens: Tensor
    logprobs: Tensor

    def first(self, count: int) -> "Candidates":
        return Candidates(*(getattr(self, f.name)[:, :count] for f in fields(self)))

    def select(self, index: Tensor) -> "Candidates":
        """index: (R, C')"""
        return Candidates(*(getattr(self, f.name).gather(1, index) for f in fields(self)))


@dataclass(frozen=True)
class Beams(Search):
    """Beam search. Live hypotheses stand best first; the pool holds the best K finished ones, best first."""

    early_stopping: Tensor  # (R,) bool
    num_return: Tensor  # (R,)
    bound: Tensor  # (R, L) by live length: what the live sum is divided by to bound all it may become
    pool_scores: Tensor  # (R, K) normalised; -inf where empty
    pool_tokens: Tensor  # (R, K, M)
    pool_logprobs: Tensor  # (R, K, M)
    pool_length: Tensor  # (R, K)
    pool_reason: Tensor  # (R, K)
    pool_met: Tensor  # (R, K) whether it holds all its forced words
    pool_parent: Tensor  # (R, K) the live hypothesis that it continued with its last token
    coverage: Coverage | None  # of the live ones, where the lane's requests ask for its penalty

    @classmethod
    def begin(
        cls,
        params: Sequence[SearchParams],
        prefixes: Sequence[Sequence[int]],
        bos: int,
        mask: Tensor | None = None,
    ) -> "Beams":
        """Requests of one lane, of width K. One live hypothesis each: beams start at [0, -inf, ...]. mask: (R, S), of
        the memory."""
        common = _begin(params, prefixes, bos, mask)
        tokens, scores = common["tokens"], common["scores"]
        scores[:, 1:] = NEG_INF
        return cls(
            **common,
            early_stopping=torch.tensor([p.early_stopping for p in params]),
            num_return=torch.tensor([p.num_return_sequences for p in params]),
            bound=_table([_bound(p.max_new_tokens, p.length_penalty) for p in params]),
            pool_scores=torch.full_like(scores, NEG_INF),
            pool_tokens=torch.zeros_like(tokens),
            pool_logprobs=torch.zeros(tokens.shape),
            pool_length=torch.zeros_like(tokens[:, :, 0]),
            pool_reason=torch.zeros_like(tokens[:, :, 0]),
            pool_met=torch.ones(scores.shape, dtype=torch.bool),
            pool_parent=torch.zeros_like(tokens[:, :, 0]),
            coverage=Coverage.begin(params, mask),
        )

    def advance(
        self,
        logprobs: Tensor,
        constrained: Tensor | None,
        eos: int,
        standing: Standing | None = None,
        weights: Tensor | None = None,
        words: Tensor | None = None,
    ) -> tuple["Beams", Tensor]:
        """One token more: logprobs (R, K, V) -> (the beams after it, the row (R, K) that each one continues).

        Takes the best 2K candidates; an EOS among the best K goes to the pool, the best K others live on. standing:
        how the hypotheses stand to the lane's forced words, which decide what is best for those who ask for some.
        weights: (R, K, S), where the rows looked at this step. words: (R, V), the tokens that the log-probabilities are
        of, in order; None for the whole vocabulary.
        """
        width, vocab_size = self.scores.shape[1], logprobs.shape[2]
        totals, index = best_candidates(self.scores, logprobs, 2 * width)
        if standing:
            totals, index = standing.best(self.scores, logprobs, totals, index)
        tokens = index % vocab_size if words is None else words.gather(1, index % vocab_size)
        found = Candidates(totals, index // vocab_size, tokens, logprobs.flatten(1).gather(1, index))
        ends = tokens == eos
        after = self.changed(length=self.length + 1)
        if self.coverage and weights is not None:
            after = after.changed(coverage=self.coverage.after(weights))
        live = found.first(width)
        if ends.any():
            done = (ends & (totals > NEG_INF))[:, :width]
            if done.any():
                met = standing.all_met(len(done)).gather(1, live.parents) if standing else None
                after = after._ended(self, live, done, constrained, met)
            live = found.select(ends.long().argsort(dim=1, stable=True)[:, :width])  # not EOS first, order kept
        if standing:  # chosen by turns of banks, but they stand best first
            live = live.select(live.totals.argsort(dim=1, descending=True, stable=True))
        if self.details:
            self.details.write(self.length, live.parents, logprobs, weights)
        written, of_each = self._histories(live)
        after = after.changed(tokens=written, logprobs=of_each, scores=live.totals, last_tokens=live.tokens)
        after = after._stopped(live.parents, standing.constraints if standing else None)
        if after.coverage:
            after = after.changed(coverage=after.coverage.moved(live.parents))
        return after, live.parents

    def _ended(
        self, before: "Beams", found: "Candidates", done: Tensor, constrained: Tensor | None, met: Tensor | None
    ) -> "Beams":
        """Those of the best K candidates that are done (R, K) compete for the pool."""
        reasons = torch.full_like(found.parents, EOS_REASON)
        if constrained is not None:
            reasons = reasons.masked_fill(constrained.gather(1, found.parents), CONSTRAINT)
        scores = self._final(found.totals, found.parents).masked_fill(~done, NEG_INF)
        return self._pooled(scores, *before._histories(found), reasons, found.parents, met)

    def _final(self, totals: Tensor, parents: Tensor) -> Tensor:
        """The scores of hypotheses that end with this token: totals, parents (R, K). The coverage is still the
        parents', which paid the attention of this step."""
        scores = self.normalised(totals)
        return scores + self.coverage.penalty().gather(1, parents) if self.coverage else scores

    def _histories(self, found: "Candidates") -> tuple[Tensor, Tensor]:
        """Tokens and logprobs (R, K, M) of the candidates' parents, with the new token of each."""
        index = found.parents[:, :, None].expand(-1, -1, self.tokens.shape[2])
        tables = self.tokens.gather(1, index), self.logprobs.gather(1, index)
        return self._written(*tables, found.tokens, found.logprobs)

    def _pooled(
        self,
        scores: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
        reasons: Tensor,
        parents: Tensor,
        met: Tensor | None,
    ) -> "Beams":
        """Finished hypotheses compete for the pool: scores (R, K), -inf for none. Earlier ones win ties.

        met: whether each holds its forced words (all do, where None); one that does not makes way for any that does.
        """
        width = scores.shape[1]
        rivals = torch.cat([self.pool_scores, scores], 1)
        holds = torch.cat([self.pool_met, torch.ones_like(self.pool_met) if met is None else met], 1)
        if met is not None:
            rivals = rivals.masked_fill(~holds & (holds & (rivals > NEG_INF)).any(1, keepdim=True), NEG_INF)
        best, order = rivals.sort(dim=1, descending=True, stable=True)
        order = order[:, :width]
        spread = order[:, :, None].expand(-1, -1, tokens.shape[2])
        length = self.length[:, None].expand_as(self.pool_length)
        return self.changed(
            pool_scores=best[:, :width],
            pool_tokens=torch.cat([self.pool_tokens, tokens], 1).gather(1, spread),
            pool_logprobs=torch.cat([self.pool_logprobs, logprobs], 1).gather(1, spread),
            pool_length=torch.cat([self.pool_length, length], 1).gather(1, order),
            pool_reason=torch.cat([self.pool_reason, reasons], 1).gather(1, order),
            pool_met=holds.gather(1, order),
            pool_parent=torch.cat([self.pool_parent, parents], 1).gather(1, order),
        )

    def _stopped(self, parents: Tensor, constraints: Constraints | None) -> "Beams":
        """Who is finished: by the stopping rule, for lack of life, or at the limit, where the live join the pool."""
        alive, empty = self.scores[:, 0] > NEG_INF, self.pool_scores[:, 0] == NEG_INF
        if (alive & empty & (self.length < self.max_length)).all():  # as in most steps
            return self
        held = ((self.pool_scores > NEG_INF) & self.pool_met).sum(1)
        bound = self.scores[:, 0] / self.bound.gather(1, self.length[:, None])[:, 0]
        worst_returned = self.pool_scores.gather(1, self.num_return[:, None] - 1)[:, 0]
        exact = (held >= self.num_return) & ~(bound > worst_returned)
        full = held == self.scores.shape[1]
        finished = torch.where(self.early_stopping, full, exact) | (self.scores[:, 0] == NEG_INF)
        limit = (self.length >= self.max_length) & ~finished
        after = self.changed(finished=finished | limit)
        if not limit.any():
            return after
        scores = self._final(self.scores, parents).masked_fill(~limit[:, None], NEG_INF)
        met = constraints.standing(self.history).all_met(len(scores)) if constraints else None
        reasons = torch.full_like(self.pool_reason, LENGTH)
        return after._pooled(scores, self.tokens, self.logprobs, reasons, parents, met)

    def results(self, request: int) -> list[Hypothesis]:
        """The best `num_return_sequences` finished ones, best first; fewer where fewer finished."""
        scores = self.pool_scores[request, : int(self.num_return[request])].tolist()
        return [
            self._hypothesis(
                request,
                self.pool_tokens[request, k],
                self.pool_logprobs[request, k],
                int(self.pool_length[request, k]),
                score,
                self.pool_reason[request, k],
                int(self.pool_parent[request, k]),
            )
            for k, score in enumerate(scores)
            if score > NEG_INF
        ]

    def settled(self, request: int) -> list[list[int]]:
        """The tokens that can no longer change, of the best output: what all that may become it have in common."""
        prefix, end = int(self.prefix_length[request]), int(self.prefix_length[request] + self.length[request])
        rivals = [
            self.tokens[request, k, prefix:end] for k in (self.scores[request] > NEG_INF).nonzero()[:, 0].tolist()
        ]
        if self.pool_scores[request, 0] > NEG_INF:
            rivals.append(self.pool_tokens[request, 0, prefix : prefix + int(self.pool_length[request, 0])])
        if not rivals:
            return [[]]
        shortest = min(len(rival) for rival in rivals)
        stacked = torch.stack([rival[:shortest] for rival in rivals])
        same = (stacked == stacked[0]).all(0).long().cumprod(0).sum()
        return [stacked[0, : int(same)].tolist()]


@dataclass(frozen=True)
class Samples(Search):
    """Greedy search (K = 1) and sampling (K independent outputs)."""

    do_sample: Tensor  # (R,) bool
    seeds: Tensor  # (R,)
    first_step: Tensor  # (R,) tokens generated before, by what the request goes on from
    outputs: Tensor  # (R, K) the index of each, for its draws
    ended: Tensor  # (R, K) bool
    end_length: Tensor  # (R, K) tokens generated by those that ended
    end_reason: Tensor  # (R, K)

    @classmethod
    def begin(
        cls,
        params: Sequence[SearchParams],
        prefixes: Sequence[Sequence[int]],
        bos: int,
        seeds: Sequence[int],
        first_steps: Sequence[int],
        first_outputs: Sequence[int],
        mask: Tensor | None = None,
    ) -> "Samples":
        """Requests of one lane, of width K. first_steps, first_outputs: where the draws of each request begin; 0 unless
        it goes on from another. mask: (R, S), of the memory."""
        common = _begin(params, prefixes, bos, mask)
        shape = common["scores"].shape
        return cls(
            **common,
            do_sample=torch.tensor([p.do_sample for p in params]),
            seeds=torch.tensor(seeds, dtype=torch.int64),
            first_step=torch.tensor(first_steps, dtype=torch.int64),
            outputs=torch.tensor(first_outputs, dtype=torch.int64)[:, None] + torch.arange(shape[1]),
            ended=torch.zeros(shape, dtype=torch.bool),
            end_length=torch.zeros(shape, dtype=torch.int64),
            end_reason=torch.zeros(shape, dtype=torch.int64),
        )

    def wants_all(self, standing: Standing | None) -> bool:
        return super().wants_all(standing) or bool(self.do_sample.any())  # noise is drawn by the token's id

    def advance(
        self,
        logprobs: Tensor,
        constrained: Tensor | None,
        eos: int,
        standing: Standing | None = None,
        weights: Tensor | None = None,
        words: Tensor | None = None,
    ) -> tuple["Samples", Tensor]:
        """One token more for each output that has not ended. Ties go to the smaller token id. (Forced words need beams,
        so `standing` is None here.) weights: (R, K, S), where the rows looked at this step. words: (R, V), the tokens
        that the log-probabilities are of, in order; None for the whole vocabulary."""
        width, vocab_size = self.scores.shape[1], logprobs.shape[2]
        preference = logprobs
        if self.do_sample.any():
            noise = gumbel(self.seeds, self.outputs, self.first_step + self.length, vocab_size)
            preference = torch.where(self.do_sample[:, None, None], logprobs + noise, logprobs)
        tokens = preference.argmax(-1)  # the first of equals
        chosen = logprobs.gather(2, tokens[:, :, None])[:, :, 0]
        tokens = tokens if words is None else words.gather(1, tokens)
        here = torch.arange(width, device=tokens.device).expand_as(tokens)
        if self.details:
            self.details.write(self.length, here, logprobs, weights)
        written, of_each = self._written(self.tokens.clone(), self.logprobs.clone(), tokens, chosen)
        after = self.changed(
            tokens=written,
            logprobs=of_each,
            last_tokens=tokens,
            scores=torch.where(self.ended, self.scores, self.scores + chosen),
            length=self.length + 1,
        )
        reason = torch.full_like(tokens, EOS_REASON)
        if constrained is not None:
            reason = reason.masked_fill(constrained, CONSTRAINT)
        after = after.end(tokens == eos, reason)
        limit = (after.length >= after.max_length)[:, None].expand_as(after.ended)
        after = after.end(limit, torch.full_like(tokens, LENGTH))
        return after, here

    def end(self, which: Tensor, reason: Tensor) -> "Samples":
        """End some outputs (R, K) where they stand, for a reason (R, K); those that ended before are left alone."""
        new = which & ~self.ended
        ended = self.ended | new
        return self.changed(
            ended=ended,
            end_length=torch.where(new, self.length[:, None], self.end_length),
            end_reason=torch.where(new, reason, self.end_reason),
            finished=ended.all(1),
        )

    def stop(self, request: int, index: int) -> "Samples":
        """End one output here; that it also reached its limit with this token is of no interest."""
        which = torch.zeros_like(self.ended)
        which[request, index] = True
        after = self.end(which, self.end_reason)
        return after.changed(end_reason=self.end_reason.masked_fill(which, STOP))

    def results(self, request: int) -> list[Hypothesis]:
        """All outputs in order of their index."""
        return [
            self._hypothesis(
                request,
                self.tokens[request, k],
                self.logprobs[request, k],
                length,
                float(self.scores[request, k] / self.penalty[request, length]),
                self.end_reason[request, k],
                k,
            )
            for k, length in enumerate(self.end_length[request].tolist())
        ]

    def settled(self, request: int) -> list[list[int]]:
        """The generated tokens of each output: none of them ever changes."""
        prefix, now = int(self.prefix_length[request]), int(self.length[request])
        ends = torch.where(self.ended[request], self.end_length[request], now).tolist()
        return [self.tokens[request, k, prefix : prefix + end].tolist() for k, end in enumerate(ends)]

    def told(
        self, request: int, output: int, first: int, end: int
    ) -> tuple[list[float], list[list[tuple[int, float]]] | None]:
        """Of an output's generated tokens from `first` to `end`: logprobs and, where asked for, top_logprobs."""
        prefix = int(self.prefix_length[request])
        logprobs = self.logprobs[request, output, prefix + first : prefix + end].tolist()
        if self.details is None:
            return logprobs, None
        return logprobs, self.details.top_logprobs_of(request, [output] * (end - first), first)


def _begin(
    params: Sequence[SearchParams], prefixes: Sequence[Sequence[int]], bos: int, mask: Tensor | None
) -> dict[str, Any]:
    """The common fields at the start of R requests of one lane, on the CPU."""
    room = max(len(prefix) + p.max_new_tokens for prefix, p in zip(prefixes, params, strict=True))
    rows, width = len(params), params[0].width
    tokens = torch.zeros(rows, width, room, dtype=torch.int64)
    for r, prefix in enumerate(prefixes):
        tokens[r, :, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    return {
        "tokens": tokens,
        "logprobs": torch.zeros(tokens.shape),
        "scores": torch.zeros(rows, width),
        "last_tokens": torch.tensor([[prefix[-1] if prefix else bos] * width for prefix in prefixes]),
        "prefix_length": torch.tensor([len(prefix) for prefix in prefixes]),
        "length": torch.zeros(rows, dtype=torch.int64),
        "max_length": torch.tensor([p.max_new_tokens for p in params]),
        "penalty": _table([_penalties(p.max_new_tokens, p.length_penalty) for p in params]),
        "finished": torch.zeros(rows, dtype=torch.bool),
        "details": Details.begin(params, mask),
    }


@lru_cache(maxsize=256)  # requests mostly ask for the same
def _penalties(limit: int, penalty: float) -> list[float]:
    """By length, what a sum is divided by."""
    return [_power(length, penalty) for length in range(limit + 1)]


@lru_cache(maxsize=256)
def _bound(limit: int, penalty: float) -> list[float]:
    """By live length t, what a live sum s <= 0 is divided by to bound the score of all that it may still become.

    A sum only falls. With a penalty p > 0 it is divided by most at the limit; with p < 0 it is divided by the most
    (which is below 1) at the shortest length that it may end with: one more, also below min_new_tokens, since rules
    that leave no token end it there. limit: max_new_tokens.
    """
    if penalty >= 0:
        return [_power(limit, penalty)] * (limit + 1)
    return [_power(min(t + 1, limit), penalty) for t in range(limit + 1)]


def _power(length: int, penalty: float) -> float:
    return float(max(length, 1) ** penalty)


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[1.0] * (longest - len(row))] for row in rows], dtype=torch.float32)
