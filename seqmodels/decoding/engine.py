"""The engine: one running batch of decoder rows that requests join and leave at any step.

Synchronous; knows no thread, no text and no HTTP. Live requests stand in lanes, one per (search, width, memory
length), all functions of the request alone. What is row-wise runs over all rows at once; attention and selection run
lane by lane. One turn is: expire, admit, give up, read, leave, advance, retire. The move of rows is one gather at the
head of `advance`, which follows beams to their parents, closes the gaps of those that left and takes in those that
joined.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import repeat, zip_longest
from typing import Any

import torch
from torch import Tensor

from seqmodels.decoding.constraints import WordEdges
from seqmodels.decoding.lane import Lane, LaneKey, Vocabulary
from seqmodels.decoding.padding import ROW_FLOOR, grouped, reading_cost
from seqmodels.decoding.params import TOP_LOGPROBS
from seqmodels.decoding.prefill import Prefill, Unread
from seqmodels.decoding.request import Event, Failed, Finished, Progress, Request
from seqmodels.decoding.saved import Position, SavedState, fingerprint
from seqmodels.decoding.search import Beams, Hypothesis, Samples
from seqmodels.decoding.sources import Encoded, Sources
from seqmodels.decoding.waiting import UNBOUNDED, Bounds, Waiting
from seqmodels.errors import DeadlineError, InputError, hopeless
from seqmodels.models import SequenceGenerator
from seqmodels.state import State
from seqmodels.stepper import Decodes, Group, Stepper

MAX_TOKENS = 20_000_000  # of all rows, since each may get room for as many as the longest request of its lane
MAX_DETAILS = 200_000_000  # numbers of alternatives and attention weights, likewise


@dataclass(eq=False)
class Newcomer:
    """A request that has its rows but still reads its prefix. memory: its own row of one."""

    request: Request
    memory: Any
    unread: Unread


@dataclass(eq=False)
class Leaver:
    """A request whose search is over, and whose outputs are read once more for their states.

    Reading them gives the same bits as writing them did, so that no search has to keep the states of what it finished;
    but for beams of a model whose states depend on what it saw, which look one by one here.
    """

    request: Request
    outputs: list[Hypothesis]
    unread: list[Unread]  # one for each output

    @property
    def done(self) -> bool:
        return all(unread.done for unread in self.unread)


class Engine:
    """Decodes for many requests at once. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: SequenceGenerator | Decodes,
        max_rows: int = 256,
        max_positions_per_step: int = 4096,
        row_floor: int = ROW_FLOOR,
        edges: WordEdges | None = None,
        prefix_cache_states: int = 1024,
    ) -> None:
        """model: in evaluation mode; or a Stepper made from it before, or an Ensemble.
        edges: of the vocabulary's words, for `force_words`; None where every token is a word.
        max_rows: decoder rows (beams of all live requests). max_positions_per_step: positions of sources encoded in
        one step, padding included, so that a burst of arrivals does not hold up those that run.
        prefix_cache_states: how many states of a language model to keep, by the prompt that led to them; 0 for none."""
        assert model.config.decoder is not None
        self.max_rows = max_rows
        self._model: Decodes = Stepper(model) if isinstance(model, SequenceGenerator) else model
        decoder = model.config.decoder
        self._bos, self._eos = decoder.bos_token_id, decoder.eos_token_id
        edges = edges or WordEdges.none(decoder.vocab_size, self._model.device)
        self._vocabulary = Vocabulary(decoder.vocab_size, decoder.pad_token_id, self._bos, self._eos, edges)
        self._max_positions_per_step = max_positions_per_step
        self._row_floor = row_floor
        self._waiting: Waiting[Request] = Waiting()
        self._rows_waiting = 0
        self._newcomers: list[Newcomer] = []
        self._leavers: list[Leaver] = []
        self._first: list[Request] = []  # who have their first token in this step
        self._sources = Sources(self._model, row_floor)
        self._prefill = Prefill(self._model, row_floor, prefix_cache_states)
        self._lanes: dict[LaneKey, Lane] = {}
        self._device = self._model.device
        self._state = State(torch.zeros(0, self._model.state_width, device=self._device))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._newcomers or self._lanes or self._leavers)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting(self) -> dict[tuple[int, str], list[float]]:
        """The deadlines of those that have no rows yet, by priority and client."""
        return self._waiting.deadlines()

    @property
    def num_rows(self) -> int:
        """Decoder rows in use, or held for those that read their prefixes, or their outputs again."""
        return sum(request.params.width for request in self._live())

    @property
    def num_rows_waiting(self) -> int:
        """Decoder rows that those who wait have asked for."""
        return self._rows_waiting

    @property
    def prefill_tokens(self) -> tuple[int, int]:
        """Tokens read outside the search so far, and those that were not since others began alike."""
        return self._prefill.tokens_read, self._prefill.tokens_saved

    def _live(self) -> Iterator[Request]:
        """The requests that have rows."""
        yield from (newcomer.request for newcomer in self._newcomers)
        yield from (leaver.request for leaver in self._leavers)
        for lane in self._lanes.values():
            yield from (request for _, request in lane.live)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError where it could never be answered."""
        self.check(request)
        request.times.submitted = time.monotonic()
        self._rows_waiting += request.params.width
        self._waiting.add(request)

    def check(self, request: Request) -> None:
        """Raises InputError where this engine could never answer a request. May be called from any thread."""
        if request.params.width > self.max_rows:
            name = "num_return_sequences" if request.params.do_sample else "num_beams"
            raise InputError(
                f"{name} is {request.params.width}, but this engine has {self.max_rows} rows; lower it",
                param=name,
                code="limit_exceeded",
            )
        if request.room * self.max_rows > MAX_TOKENS:
            raise InputError(
                f"max_new_tokens is {request.params.max_new_tokens} after {len(request.prefix)} given tokens, which is "
                "more than this engine can hold; lower it, or give less",
                param="max_new_tokens",
                code="limit_exceeded",
            )
        if request.shortlist is not None and not (request.shortlist > self._eos).any():
            raise InputError("shortlist holds no word; add some, or leave it out", param="shortlist")
        if request.shortlist is not None and not (request.shortlist == self._eos).any():
            raise InputError(f"shortlist lacks token {self._eos}, which ends a text; add it", param="shortlist")
        for name in ("output_attentions", "coverage_penalty"):
            if getattr(request.params, name) and not self._model.output_attentions:
                reason = "this model has not" if not self._model.attends else "this ensemble has over different grids"
                raise InputError(f"{name} needs attention, which {reason}; leave it out", param=name)
        if request.room * self._num_kept(request) * self.max_rows > MAX_DETAILS:
            raise InputError(
                f"max_new_tokens is {request.params.max_new_tokens}, which is more than this engine can hold with "
                "top_logprobs or output_attentions; lower it",
                param="max_new_tokens",
                code="limit_exceeded",
            )
        if request.state:
            self._check_state(request, request.state)

    def num_details(self, request: Request) -> int:
        """Numbers that are answered of each token beside it: alternatives with their log-probabilities, and weights."""
        cells = self._cells or (0 if request.inputs is None else len(request.inputs))
        return 2 * request.params.top_logprobs + cells * request.params.output_attentions

    def _num_kept(self, request: Request) -> int:
        """The same of what is kept meanwhile, by all rows of a lane alike, and where each row came from."""
        top, attentions = request.params.top_logprobs > 0, request.params.output_attentions
        cells = self._cells or LaneKey.of(request, self._model.attends).positions
        return 2 * TOP_LOGPROBS * top + cells * attentions + (top or attentions)

    @property
    def _cells(self) -> int:
        """Of a picture's grid; 0 where the input is none."""
        grid = self._model.config.grid
        return grid[0] * grid[1] if grid else 0

    def _check_state(self, request: Request, state: SavedState) -> None:
        given = len(state.tokens)
        if state.position.inputs != fingerprint(request.inputs):
            raise InputError("state was made with other inputs; send the same ones again", param="state")
        if len(state.values) != 4 * self._model.state_width or request.prefix[:given] != state.tokens:
            raise InputError(
                "state does not fit the model, or the prefix does not begin with its tokens", param="state"
            )

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; its rows are free at the next step. Unknown ids are ignored."""
        self._no_longer_wait(self._waiting.remove(request_id))
        self._drop({request_id})

    def _no_longer_wait(self, requests: Sequence[Request]) -> None:
        self._rows_waiting -= sum(request.params.width for request in requests)
        self._sources.forget(requests)

    @torch.inference_mode()
    def step(self, bounds: Bounds = UNBOUNDED) -> list[Event]:
        """One token for all live requests."""
        events: list[Event] = self._expire()
        self._admit(bounds.share)
        events += self._give_up(bounds)
        self._read()
        events += self._leave()
        if self._lanes:
            self._advance()
            for request in self._first:
                request.times.first_token = time.monotonic()
            events += self._retire()
        return events

    def _expire(self) -> list[Event]:
        now = time.monotonic()
        expired = self._waiting.expired(now)
        self._no_longer_wait(expired)
        late = [request.id for request in expired]
        passed = {request.id for request in self._live() if request.deadline is not None and request.deadline <= now}
        late += self._drop(passed) if passed else []
        return [Failed(name, DeadlineError("the deadline passed before the answer was ready")) for name in late]

    def _give_up(self, bounds: Bounds) -> list[Event]:
        """On those who wait in vain: with rows they would take them from others, and be late all the same."""
        now = time.monotonic()

        def needed_s(request: Request) -> float:
            return bounds.needed_s(request.params.max_new_tokens + 1)  # the turn that goes on included

        def in_vain(request: Request) -> bool:
            return request.deadline is not None and request.deadline <= now + needed_s(request)

        given_up = self._waiting.expired(now + bounds.needs_s, in_vain) if bounds.needs_s else []
        self._no_longer_wait(given_up)
        return [Failed(request.id, hopeless(needed_s(request))) for request in given_up]

    def _drop(self, ids: Set[str]) -> list[str]:
        """Remove live requests; returns the ids of those that were there."""
        dropped = [request.id for request in self._live() if request.id in ids]
        self._newcomers = [newcomer for newcomer in self._newcomers if newcomer.request.id not in ids]
        self._leavers = [leaver for leaver in self._leavers if leaver.request.id not in ids]
        for lane in list(self._lanes.values()):
            self._let_go(lane, [r for r, request in lane.live if request.id in ids])
        return dropped

    def _let_go(self, lane: Lane, places: Sequence[int]) -> None:
        if places:
            lane.leave(places)
        if not lane.live:
            del self._lanes[lane.key]

    # -- admit ---------------------------------------------------------------------------------------------------

    def _admit(self, share: float) -> None:
        """Take waiting requests in their turn while this share of the rows and the budget of positions last.

        A wide request at the head waits for rows to free. Until then only those go before it whose turn is earlier by
        the order of `Waiting`: a higher priority, a client with fewer rows, an earlier deadline.
        """
        if not self._waiting:
            return
        taken: list[Request] = []
        rows, positions = int(share * self.max_rows) - self.num_rows, self._max_positions_per_step
        rows_of = self._rows_by_client()
        while (request := self._waiting.head(rows_of)) and (request.params.width <= rows or not rows_of.total()):
            cost = reading_cost(request.inputs)
            if taken and cost > positions:
                break
            self._waiting.take(request)
            rows, positions = rows - request.params.width, positions - cost
            rows_of[request.client] += request.params.width
            self._rows_waiting -= request.params.width
            request.times.admitted = time.monotonic()
            taken.append(request)
        encoded = self._sources.encode(taken, self._waiting.near_the_front(rows_of), positions)
        self._newcomers += map(self._newcomer, taken, encoded)

    def _rows_by_client(self) -> Counter[str]:
        rows: Counter[str] = Counter()
        for request in self._live():
            rows[request.client] += request.params.width
        return rows

    def _newcomer(self, request: Request, encoded: Encoded) -> Newcomer:
        # The last token of a prefix is not read here: it is what the first step reads.
        tokens = (self._bos, *request.prefix[:-1]) if request.prefix else ()
        memory = encoded.memory if self._model.reads_memory else None
        if saved := request.state:
            state = saved.state(self._model.state_width).to(self._device)
            return Newcomer(request, encoded.memory, Unread(tokens, state, len(saved.tokens), memory=memory))
        shared = request.inputs is None
        return Newcomer(request, encoded.memory, Unread(tokens, encoded.state, shared=shared, memory=memory))

    def _read(self) -> None:
        """Some tokens more of what is to be read; those who have read their prefixes join their lanes."""
        leaving = (unread for leaver in self._leavers for unread in leaver.unread)
        coming = (newcomer.unread for newcomer in self._newcomers)
        turns = (unread for pair in zip_longest(leaving, coming) for unread in pair)  # neither waits for all the other
        self._prefill.read([unread for unread in turns if unread])
        ready = [newcomer for newcomer in self._newcomers if newcomer.unread.done]
        self._newcomers = [newcomer for newcomer in self._newcomers if not newcomer.unread.done]
        for group in grouped(ready, lambda newcomer: LaneKey.of(newcomer.request, self._model.attends)):
            self._join(group)
        self._first = [newcomer.request for newcomer in ready]

    def _join(self, newcomers: Sequence[Newcomer]) -> None:
        """Put those of one lane key into their lane, and their states at the end of the engine's."""
        requests = [newcomer.request for newcomer in newcomers]
        states = [newcomer.unread.state for newcomer in newcomers]
        key, first = LaneKey.of(requests[0], self._model.attends), self._state.num_rows
        self._state = State(torch.cat([self._state.values, *(state.values for state in states)]))
        memory = None
        if key.positions:
            memory, *others = (newcomer.memory for newcomer in newcomers)
            memory = memory.concat(*others)
        rows = first + torch.arange(len(requests), device=self._device)[:, None].expand(-1, key.width)
        lane = Lane.begin(key, self._vocabulary, self._model, requests, memory, states, rows)
        if key in self._lanes:
            self._lanes[key].join(lane)
        else:
            self._lanes[key] = lane

    # -- advance and retire --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One token for every row: move, step, then select lane by lane."""
        lanes = sorted(self._lanes.values(), key=lambda lane: lane.key)  # so that a step's shapes come again
        for lane in lanes:
            lane.close_gaps()
        rows = _joined([lane.rows.flatten() for lane in lanes])
        tokens = _joined([lane.search.last_tokens.flatten() for lane in lanes])
        if (missing := self._row_floor - len(rows)) > 0:  # padding rows copy a valid one
            rows, tokens = _repeat_first(rows, missing), _repeat_first(tokens, missing)
        groups = [Group(len(lane.requests), lane.key.width, lane.memory, lane.shortlist) for lane in lanes]
        logits, self._state, weights = self._model.step(tokens, self._state.select(rows), groups)
        first = 0
        for lane, lane_logits, looked in zip(lanes, logits, weights or repeat(None, len(lanes)), strict=True):
            lane.advance(lane_logits, looked, first)
            first += lane.rows.numel()

    def _retire(self) -> list[Event]:
        """Report what is new, and let the finished go."""
        events: list[Event] = []
        for lane in list(self._lanes.values()):
            told = [r for r, request in enumerate(lane.requests) if request.watch or request.stream]
            for r, search, number in lane.readable(told):
                events += self._report(lane, r, search, number)
            ended = [r for r, done in enumerate(lane.search.finished.tolist()) if done]
            for r, search, number in lane.readable(ended):
                events += self._finish(lane, r, search.results(number))
            self._let_go(lane, ended)
        return events

    def _finish(self, lane: Lane, r: int, outputs: list[Hypothesis]) -> list[Event]:
        """The answer of a request of a lane; none yet where the states of its outputs are to be read."""
        request, begun = lane.requests[r], lane.begun[r]
        request.times.finished = time.monotonic()
        request.times.num_tokens = max((len(output.logprobs) for output in outputs), default=0)
        if begun is None:
            return [Finished(request.id, outputs)]
        memory = lane.memory_of(r) if self._model.reads_memory else None
        unread = []
        for output in outputs:
            kept = self._kept(output)
            unread.append(Unread((self._bos, *kept)[: len(kept)], begun, len(request.prefix), memory=memory))
        self._leavers.append(Leaver(request, outputs, unread))
        return []

    def _leave(self) -> list[Event]:
        """The answers of those whose outputs have been read again."""
        done = [leaver for leaver in self._leavers if leaver.done]
        self._leavers = [leaver for leaver in self._leavers if not leaver.done]
        return [
            Finished(leaver.request.id, [self._with_state(leaver, k) for k in range(len(leaver.outputs))])
            for leaver in done
        ]

    def _with_state(self, leaver: Leaver, k: int) -> Hypothesis:
        """An output that has been read again, with its state."""
        request, output = leaver.request, leaver.outputs[k]
        kept = self._kept(output)
        new = len(kept) - len(request.prefix)
        step, index = request.first_draw
        position = Position(
            num_generated=request.num_continued + new,
            step=step + new,
            output=index + k,
            seed=request.seed,
            inputs=fingerprint(request.inputs),
        )
        return replace(output, state=SavedState(tuple(kept), leaver.unread[k].state.to_bytes(), position))

    def _kept(self, output: Hypothesis) -> list[int]:
        """The tokens that what goes on from it begins with: an EOS is left out, so that more text may follow."""
        return output.tokens[:-1] if output.tokens[-1:] == [self._eos] and output.logprobs else output.tokens

    def _report(self, lane: Lane, r: int, search: Beams | Samples, number: int) -> Iterable[Event]:
        """What is new of a request of a lane, which has this number in the search."""
        request = lane.requests[r]
        for index, tokens in enumerate(search.settled(number)):
            first, lane.sent[r][index] = lane.sent[r][index], len(tokens)
            if first == len(tokens):
                continue
            if request.watch and isinstance(lane.search, Samples) and request.watch(index, tokens):
                lane.search = lane.search.stop(r, index)
            if request.stream and request.params.logprobs and isinstance(search, Samples):
                yield Progress(request.id, index, tokens[first:], *search.told(number, index, first, len(tokens)))
            elif request.stream:
                yield Progress(request.id, index, tokens[first:])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _repeat_first(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x[:1].expand(count)])
