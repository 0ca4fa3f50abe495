"""Lane: live requests of one kind, side by side. Which kind is a function of the request alone, and so are the shapes
that its numbers are computed in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqmodels.decoding.constraints import WordEdges
from seqmodels.decoding.logits import Rules
from seqmodels.decoding.padding import LANES, SHORTLISTS, bucket, padded_length
from seqmodels.decoding.request import Request
from seqmodels.decoding.search import Beams, Samples
from seqmodels.state import State
from seqmodels.stepper import Decodes, Shortlisted


@dataclass(frozen=True, order=True)
class LaneKey:
    """What decides the shapes that a request sees: a function of the request alone."""

    beams: bool
    width: int
    positions: int  # of memory; 0 without attention
    shortlist: int  # its padded length; 0 without one
    top_logprobs: bool  # these three: which tables the lane keeps
    output_attentions: bool
    coverage: bool

    @classmethod
    def of(cls, request: Request, attends: bool) -> "LaneKey":
        """attends: whether the model looks at a memory."""
        params = request.params
        return cls(
            params.num_beams > 1,
            params.width,
            padded_length(request.inputs, LANES) if attends else 0,
            _shortlist_length(request),
            params.top_logprobs > 0,
            params.output_attentions,
            params.coverage_penalty > 0,
        )


def _shortlist_length(request: Request) -> int:
    if request.shortlist is None or len(request.shortlist) > SHORTLISTS[-1]:
        return 0
    return bucket(len(request.shortlist), SHORTLISTS)


@dataclass(frozen=True)
class Vocabulary:
    """What a search has to know of the tokens: how many there are, which are special, and where words go on."""

    size: int
    pad: int
    bos: int
    eos: int
    edges: WordEdges


@dataclass
class Lane:
    """The live requests of one key; tensors have the request on axis 0."""

    key: LaneKey
    vocabulary: Vocabulary
    requests: list[Request]
    search: Beams | Samples
    memory: Any  # a Memory, or a MemoryGroup of an ensemble; None without attention
    shortlist: Shortlisted | None
    rows: Tensor  # (R, K) where each hypothesis's state stands in the engine's State
    sent: list[list[int]]  # tokens already streamed, by output
    begun: list[State | None]  # after the prefix, of those who want their states back
    rules: Rules | None = None  # of all requests; None where they have changed since
    vacant: list[int] = field(default_factory=list)  # places of those that left, until others take them

    @classmethod
    def begin(
        cls,
        key: LaneKey,
        vocabulary: Vocabulary,
        model: Decodes,
        requests: list[Request],
        memory: Any,
        states: Sequence[State],
        rows: Tensor,
    ) -> "Lane":
        """A lane of newcomers. memory, states: a row each; rows (R, K): where the states stand in the engine's."""
        mask = memory and memory.mask.clone()  # the memory's own will be written over
        return cls(
            key,
            vocabulary,
            requests,
            _search(key, requests, vocabulary.bos, mask).to(model.device),
            memory,
            model.shorten(_lists(requests, key.shortlist, vocabulary.pad).to(model.device)) if key.shortlist else None,
            rows,
            [[0] * key.width for _ in requests],
            [state if request.return_state else None for state, request in zip(states, requests, strict=True)],
        )

    @property
    def live(self) -> list[tuple[int, Request]]:
        """Those that are still here, and their places."""
        vacant = set(self.vacant)
        return [(r, request) for r, request in enumerate(self.requests) if r not in vacant]

    def advance(self, logits: Tensor, weights: Tensor | None, first: int) -> None:
        """One token for each hypothesis: logits (R, K, V), or (R, K, L) of the tokens on the shortlists; weights
        (R, K, S), where the rows looked. first: where the lane's rows began in the step, and so in the new State."""
        if self.rules is None:
            self.rules = self._rules()
        standing, constrained, words = self.rules.standing(self.search.history), None, None
        if self.rules.change_logits:  # they know tokens by their ids
            everyone = self.shortlist.spread(logits, self.vocabulary.size) if self.shortlist else logits
            everyone, constrained = self.rules.apply(everyone, self.search.history, standing)
            logits = self.shortlist.listed(everyone) if self.shortlist else everyone
        # Over the list, so that these are the same bits whoever has rules; and in place, which saves a fifth.
        logprobs = torch.log_softmax(logits, -1, out=logits)
        if self.shortlist and self.search.wants_all(standing):
            logprobs = self.shortlist.spread(logprobs, self.vocabulary.size)
        elif self.shortlist:
            words = self.shortlist.words
        self.search, parents = self.search.advance(logprobs, constrained, self.vocabulary.eos, standing, weights, words)
        here = torch.arange(first, first + self.rows.numel(), device=self.rows.device).view_as(self.rows)
        self.rows = here.gather(1, parents)

    def _rules(self) -> Rules:
        return Rules(
            [r.params for r in self.requests],
            [r.bad_words for r in self.requests],
            [r.force_words for r in self.requests],
            self.vocabulary.edges,
            self.vocabulary.eos,
            self.rows.device,
        )

    def readable(self, places: Sequence[int]) -> list[tuple[int, Beams | Samples, int]]:
        """Of each place, a search on the CPU, and the number of the place's request there. Of a GPU's search a copy,
        since each number that Python reads of it would be waited for."""
        if not places or self.rows.device.type == "cpu":
            return [(place, self.search, place) for place in places]
        return self.copied(places)

    def copied(self, places: Sequence[int]) -> list[tuple[int, Beams | Samples, int]]:
        """`readable`, of a GPU's search: a search of those places alone, one copy of each of its tables."""
        index = torch.tensor(places, dtype=torch.int64, device=self.rows.device)
        few = self.search.select(index).to(torch.device("cpu"))
        return [(place, few, number) for number, place in enumerate(places)]

    def memory_of(self, place: int) -> Any:
        """A request's own row of one, a copy."""
        return self.memory.select(torch.tensor([place], device=self.rows.device))

    def leave(self, places: Sequence[int]) -> None:
        """Some are done. Their places stay until newcomers take them, which moves nobody, or `close_gaps`."""
        self.vacant += places
        self.rules = None

    def join(self, other: "Lane") -> None:
        """Take in the requests of another lane of the same key, in the places of those that left or behind all."""
        self.rules = None
        count = len(other.requests)
        if count <= len(self.vacant):
            places, self.vacant = self.vacant[:count], self.vacant[count:]
            self._put(places, other)
        else:
            self.close_gaps()
            self._append(other)

    def close_gaps(self) -> None:
        if not self.vacant:
            return
        keep, self.vacant = [r for r, _ in self.live], []
        index = torch.tensor(keep, dtype=torch.int64, device=self.rows.device)
        self.requests = [self.requests[r] for r in keep]
        self.sent = [self.sent[r] for r in keep]
        self.begun = [self.begun[r] for r in keep]
        self.search = self.search.select(index).trimmed(self._room)
        self.memory = self.memory and self.memory.select(index)
        self.shortlist = self.shortlist and self.shortlist.select(index)
        self.rows = self.rows.index_select(0, index)

    def _put(self, places: Sequence[int], other: "Lane") -> None:
        for r, place in enumerate(places):
            self.requests[place], self.sent[place], self.begun[place] = other.requests[r], other.sent[r], other.begun[r]
        index = torch.tensor(places, dtype=torch.int64, device=self.rows.device)
        self.search = self.search.put(index, other.search).trimmed(self._room)  # type: ignore[arg-type]
        if self.memory is not None:
            self.memory = self.memory.put(index, other.memory)
        if self.shortlist is not None:
            self.shortlist = self.shortlist.put(index, other.shortlist)  # type: ignore[arg-type]  # same key: both or none
        self.rows.index_copy_(0, index, other.rows)

    def _append(self, other: "Lane") -> None:
        self.requests += other.requests
        self.sent += other.sent
        self.begun += other.begun
        self.search = self.search.concat(other.search)  # type: ignore[arg-type]  # same key, so the same kind
        if self.memory is not None:
            self.memory = self.memory.concat(other.memory)
        if self.shortlist is not None:
            self.shortlist = self.shortlist.concat(other.shortlist)  # type: ignore[arg-type]
        self.rows = torch.cat([self.rows, other.rows])

    @property
    def _room(self) -> int:
        """Positions that the longest of the requests may fill."""
        return max(request.room for _, request in self.live)


def _search(key: LaneKey, requests: Sequence[Request], bos: int, mask: Tensor | None) -> Beams | Samples:
    """The search of newcomers before their first token, on the CPU."""
    params, prefixes = [r.params for r in requests], [r.prefix for r in requests]
    if key.beams:
        return Beams.begin(params, prefixes, bos, mask)
    steps, outputs = zip(*(r.first_draw for r in requests), strict=True)
    return Samples.begin(params, prefixes, bos, [r.seed for r in requests], steps, outputs, mask)


def _lists(requests: Sequence[Request], length: int, pad: int) -> Tensor:
    """The tokens that each may write (R, L), in order and without repeats, as ties and sums need them; then padding."""
    lists = torch.full((len(requests), length), pad)
    for row, request in zip(lists, requests, strict=True):
        assert request.shortlist is not None, "requests of a lane have one all, or none has"
        words = torch.unique(request.shortlist)
        words = words[words != pad]
        row[: len(words)] = words
    return lists
