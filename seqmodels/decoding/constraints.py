"""Forced words: phrases that an output must hold, each as whole words.

Knows tokens, and which of them continue a word; knows no text. All is computed from what a hypothesis has written, so
no state is carried. The places of a beam are shared between hypotheses that hold more and less of their phrases, after
Post and Vilar 2018 ("Fast lexically constrained decoding with dynamic beam allocation").

R requests, K hypotheses each, C phrases, L tokens in the longest, M token positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.decoding.history import BEFORE, NEVER, History

Phrases = Sequence[Sequence[int]]  # of one request: the tokens of each


@dataclass(frozen=True)
class WordEdges:
    """Where words of a vocabulary go on: each (V,) of bool.

    continues: the token's text begins within a word, so that it goes on with what stands before it. open: its text
    ends within a word, so that the next token may go on with it. Tokens that are whole words are neither.
    """

    continues: Tensor
    open: Tensor

    @classmethod
    def none(cls, vocab_size: int, device: torch.device) -> "WordEdges":
        """Of a vocabulary whose tokens are whole words."""
        no = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        return cls(no, no)

    def joined(self, left: Tensor, right: Tensor) -> Tensor:
        """Whether two neighbouring tokens are of one word. A negative id is no token, and joins nothing."""
        return self._at(self.open, left) & self._at(self.continues, right)

    @staticmethod
    def _at(flags: Tensor, tokens: Tensor) -> Tensor:
        return flags[tokens.clamp(min=0)] & (tokens >= 0)


class Constraints:
    """The phrases of some requests of a lane: phrases (R, C, L), NEVER where there is no token."""

    def __init__(self, phrases: Sequence[Phrases], edges: WordEdges) -> None:
        """phrases: of each of the lane's requests; those without any are left out of all that follows."""
        device = edges.open.device
        asked = [r for r, request in enumerate(phrases) if request]
        count = max(len(phrases[r]) for r in asked)
        longest = max(len(phrase) for r in asked for phrase in phrases[r])
        table = torch.full((len(asked), count, longest), NEVER)
        for row, r in zip(table, asked, strict=True):
            for place, phrase in zip(row, phrases[r], strict=False):
                place[: len(phrase)] = torch.tensor(phrase)
        self.requests = torch.tensor(asked, device=device)  # where they stand in the lane
        self.phrases = table.to(device)
        self.lengths = (self.phrases != NEVER).sum(2)  # (R, C)
        self.edges = edges

    def standing(self, history: History) -> "Standing":
        """How far each hypothesis of the lane has come; history: of all its requests."""
        history = history.select(self.requests)
        first = self.phrases[:, None, :, 0]  # (R, 1, C)
        last = self.phrases.gather(2, (self.lengths - 1).clamp(min=0)[:, :, None])[:, None, :, 0]
        absent = (self.lengths == 0)[:, None]

        whole, partly, following = self._occurrences(history)
        closed = (whole & (following >= 0) & ~self.edges.joined(last[..., None], following)).any(3)
        at_end = (whole & (following == BEFORE)).any(3)
        met = closed | at_end | absent
        positions = torch.arange(whole.shape[3], device=whole.device)
        depth = torch.where(partly, history.written[:, None, None, None] - positions, 0).amax(3)
        depth = depth.masked_fill(met, 0)

        ending = history.tail(1)  # (R, K, 1)
        may_begin = ~self.edges.joined(ending, first)
        wanted = self.phrases[:, None].expand(-1, depth.shape[1], -1, -1).gather(3, depth[..., None])[..., 0]
        begin = first.masked_fill(met | ~may_begin, NEVER)
        wanted = torch.where(depth > 0, wanted, begin)
        loose = at_end & ~closed & ~absent & self.edges.open[last.clamp(min=0)]
        return Standing(self, met, loose, depth, wanted, begin)

    def _occurrences(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """At each position, after the prefix and at the beginning of a word where the phrase begins one: whether a
        phrase stands there, whether all that is written from there on is its beginning, and the token after it
        (BEFORE where nothing is written yet). Each (R, K, C, M)."""
        length, width = self.phrases.shape[2], history.tokens.shape[2]
        positions = torch.arange(width, device=history.tokens.device)
        written = positions < history.written[:, None, None]
        tokens = F.pad(history.tokens.masked_fill(~written, BEFORE), (1, length), value=BEFORE)
        windows = tokens[:, :, 1:].unfold(2, length, 1)[:, :, None, :width]  # (R, K, 1, M, L)
        phrases = self.phrases[:, None, :, None]  # (R, 1, C, 1, L)
        equal = (windows == phrases) | (phrases == NEVER)
        prefix = (history.written - history.generated)[:, None, None, None]
        first = self.phrases[:, None, :, None, 0]
        may = ~self.edges.joined(tokens[:, :, None, :width], first) & (positions >= prefix) & (first != NEVER)
        ends = (positions + 1 + self.lengths[:, None, :, None]).expand(-1, tokens.shape[1], -1, -1)
        following = tokens[:, :, None].expand(-1, -1, phrases.shape[2], -1).gather(3, ends)
        partly = (equal | (windows == BEFORE)).all(4) & may & written[:, :, None]
        whole = equal.all(4) & may
        return whole, partly & ~whole, following


@dataclass(frozen=True)
class Standing:
    """Constraints as each hypothesis stands to them.

    Each (R, K, C). met: whether it holds the phrase. loose: it holds it at its end alone, and no longer if the word
    goes on. Of an unmet one: depth: how many of its tokens stand at the end. wanted: the token it goes on with.
    begin: the one that it begins with. Both are NEVER where there is none, or it cannot begin because a word goes on.
    """

    constraints: Constraints
    met: Tensor
    loose: Tensor
    depth: Tensor
    wanted: Tensor
    begin: Tensor

    def ban(self, logits: Tensor, eos: int) -> Tensor:
        """The lane's logits (R, K, V) without EOS for hypotheses that lack a phrase."""
        chosen = logits[self.constraints.requests]
        chosen[:, :, eos] = chosen[:, :, eos].masked_fill(~self.met.all(2), float("-inf"))
        return logits.index_copy(0, self.constraints.requests, chosen)

    def all_met(self, requests: int) -> Tensor:
        """Whether each hypothesis of the lane's R requests holds all its phrases: (R, K)."""
        everyone = self.met.new_ones(requests, self.met.shape[1])
        return everyone.index_copy(0, self.constraints.requests, self.met.all(2))

    def best(self, scores: Tensor, logprobs: Tensor, totals: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The lane's best candidates (R, C'), totals and index, with those of our requests chosen anew.

        scores (R, K) are the hypotheses', logprobs (R, K, V) their next tokens'. Considered are the best tokens of
        each hypothesis, the best that ends a word, and those that its phrases want. Candidates that hold equally much
        of their phrases are a bank; first come the best of every bank, the fullest bank leading, then the second best
        of every bank, and so on: so that what holds most goes on, however unlikely it is.
        """
        ours = self.constraints.requests
        logprobs, count = logprobs[ours], totals.shape[1]
        likely = logprobs.topk(min(count, logprobs.shape[2]), dim=2).indices
        ending = logprobs.masked_fill(self.constraints.edges.continues, float("-inf")).argmax(2, keepdim=True)
        tokens = torch.cat([likely, ending, self.wanted, self.begin], dim=2)
        given = logprobs.gather(2, tokens.clamp(min=0)).masked_fill(_repeated(tokens) | (tokens < 0), float("-inf"))
        places = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * logprobs.shape[2] + tokens.clamp(min=0)
        new_totals, new_index = _by_turns(
            (scores[ours][:, :, None] + given).flatten(1), places.flatten(1), self._bank(tokens).flatten(1), count
        )
        return totals.index_copy(0, ours, new_totals), index.index_copy(0, ours, new_index)

    def _bank(self, tokens: Tensor) -> Tensor:
        """How many tokens of its phrases a hypothesis holds once it goes on with each of tokens (R, K, X)."""
        lengths, goes_on = self.constraints.lengths[:, None], self.constraints.edges.continues[tokens.clamp(min=0)]
        held = (self.met * lengths).sum(2)[:, :, None] - goes_on * (self.loose * lengths).sum(2)[:, :, None]
        begins = tokens[..., None] == self.begin[:, :, None]
        next_one = tokens[..., None] == self.wanted[:, :, None]
        return held + torch.where(next_one, self.depth[:, :, None] + 1, begins.long()).amax(3).masked_fill(
            tokens < 0, 0
        )


def _repeated(tokens: Tensor) -> Tensor:
    """Which of the tokens (R, K, X) stand earlier in their row too."""
    place = torch.arange(tokens.shape[2], device=tokens.device)
    return ((tokens[..., None] == tokens[:, :, None]) & (place < place[:, None])).any(3)


def _by_turns(totals: Tensor, index: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of candidates (R, Y) when banks take turns. In a bank the higher total is first, then the
    smaller index; those at -inf come last."""
    order = index.argsort(dim=1)
    for key in (totals, bank):  # stable, so the last key leads
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))
    totals, index, bank = totals.gather(1, order), index.gather(1, order), bank.gather(1, order)
    place = torch.arange(totals.shape[1], device=totals.device)
    starts = torch.ones_like(bank, dtype=torch.bool)
    starts[:, 1:] = bank[:, 1:] != bank[:, :-1]
    turn = place - torch.where(starts, place, 0).cummax(1).values
    turn = turn.masked_fill(totals == float("-inf"), totals.shape[1])
    first = turn.argsort(dim=1, stable=True)[:, :count]  # within a turn the fuller bank stands first already
    return totals.gather(1, first), index.gather(1, first)


def missing(tokens: Sequence[int], prefix: int, phrases: Phrases, edges: WordEdges) -> list[int]:
    """Which phrases a finished output does not hold as whole words, by number. prefix: tokens that do not count."""
    continues, is_open = edges.continues.tolist(), edges.open.tolist()

    def holds(phrase: Sequence[int], start: int) -> bool:
        end = start + len(phrase)
        if tuple(tokens[start:end]) != tuple(phrase):
            return False
        begins = start == 0 or not (is_open[tokens[start - 1]] and continues[phrase[0]])
        return begins and (end == len(tokens) or not (is_open[phrase[-1]] and continues[tokens[end]]))

    return [c for c, phrase in enumerate(phrases) if not any(holds(phrase, p) for p in range(prefix, len(tokens)))]
