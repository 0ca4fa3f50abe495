"""The engine: one running batch of decoder rows that requests join and leave at any step.

Synchronous; knows no thread, no text and no HTTP. Live requests stand in lanes, one per (search, width, memory
length), all functions of the request alone. What is row-wise runs over all rows at once; attention and selection run
lane by lane. One turn is: expire, admit, read, advance, retire. The move of rows is one gather at the head of
`advance`, which follows beams to their parents, closes the gaps of those that left and takes in those that joined.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import groupby, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqmodels.decoding.constraints import WordEdges
from seqmodels.decoding.logits import Rules
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.prefill import Prefill, Unread
from seqmodels.decoding.saved import Position, SavedState, fingerprint
from seqmodels.decoding.search import Beams, Hypothesis, Samples
from seqmodels.decoding.waiting import Waiting
from seqmodels.errors import DeadlineError, InputError, SeqModelsError
from seqmodels.models import SequenceGenerator
from seqmodels.state import State
from seqmodels.stepper import Decodes, Group, Stepper
from seqmodels.tokenizer import PAD

T = TypeVar("T")

ROW_FLOOR = 4  # with fewer rows CPU kernels take another path, and a row gets other bits
MAX_TOKENS = 20_000_000  # of all rows, since each may get room for as many as the longest request of its lane
MAX_DETAILS = 200_000_000  # numbers of alternatives and attention weights, likewise
BUCKETS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # padded lengths of what an encoder reads
# Padded lengths of what attention looks at: few, because a lane costs more per step than padding does. Over 12, from
# where on the masked product of a CPU gives the same bits for every padding.
LANES = (32, 128, 512, 1024)
SHORTLISTS = (128, 256, 512, 1024)  # padded lengths of the requests' shortlists


@dataclass(frozen=True, eq=False)
class Request:
    """One request for output. All that its answer depends on is here.

    inputs: (S,) token ids, (S, D) features, (C, H, W) image or (S, C, H, W) frames; None for a language model.
    watch: called with (output index, its generated tokens so far) after each step; true ends that output ("stop").
    shortlist: (L,) the tokens that it may write; None for all.
    deadline: a time.monotonic() after which the answer is of no use. priority: higher goes first. client: for whom;
    of equal priority, those with the fewest rows in use go first.
    state: what it goes on from, with the same inputs; the prefix then begins with all tokens of that state.
    return_state: whether its hypotheses come with theirs.
    """

    id: str
    inputs: Tensor | None
    params: SearchParams
    prefix: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    force_words: tuple[tuple[int, ...], ...] = ()
    shortlist: Tensor | None = None
    seed: int = 0
    stream: bool = False
    watch: Callable[[int, Sequence[int]], bool] | None = None
    deadline: float | None = None
    priority: int = 0
    client: str = ""
    state: SavedState | None = None
    return_state: bool = False

    @property
    def num_continued(self) -> int:
        """How many of the prefix's last tokens are output of what it goes on from, with no text given since."""
        if self.state is None or len(self.prefix) > len(self.state.tokens):
            return 0
        return self.state.position.num_generated

    @property
    def first_draw(self) -> tuple[int, int]:
        """The step and the output index at which its draws begin."""
        return (self.state.position.step, self.state.position.output) if self.state else (0, 0)

    @property
    def room(self) -> int:
        """Positions that its tokens may fill, prefix included."""
        return len(self.prefix) + self.params.max_new_tokens


@dataclass(frozen=True)
class Progress:
    """New tokens of one output, which can no longer change."""

    request_id: str
    index: int
    tokens: list[int]


@dataclass(frozen=True)
class Finished:
    """The whole answer: hypotheses of a generator; a tensor of labels' or targets' scores from a forward pass."""

    request_id: str
    result: list[Hypothesis] | Tensor


@dataclass(frozen=True)
class Failed:
    request_id: str
    error: SeqModelsError


Event = Progress | Finished | Failed


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


@dataclass
class Lane:
    """The live requests of one key; tensors have the request on axis 0."""

    key: LaneKey
    requests: list[Request]
    search: Beams | Samples
    memory: Any  # a Memory, or a MemoryGroup of an ensemble; None without attention
    shortlist: Tensor | None  # (R, L)
    rows: Tensor  # (R, K) where each hypothesis's state stands in the engine's State
    rules: Rules
    sent: list[list[int]] = field(default_factory=list)  # tokens already streamed, by output
    begun: list[State | None] = field(default_factory=list)  # after the prefix, of those who want their states back

    def select(self, keep: Sequence[int]) -> None:
        """Keep some requests, in order."""
        index = torch.tensor(keep, dtype=torch.int64, device=self.rows.device)
        self.requests = [self.requests[r] for r in keep]
        self.sent = [self.sent[r] for r in keep]
        self.begun = [self.begun[r] for r in keep]
        self.search = self.search.select(index).trimmed(max(request.room for request in self.requests))
        self.memory = self.memory and self.memory.select(index)
        self.shortlist = None if self.shortlist is None else self.shortlist.index_select(0, index)
        self.rows = self.rows.index_select(0, index)

    def join(self, other: "Lane") -> None:
        """Take in the requests of another lane of the same key."""
        self.requests += other.requests
        self.sent += other.sent
        self.begun += other.begun
        self.search = self.search.concat(other.search)  # type: ignore[arg-type]  # same key, so the same kind
        self.memory = self.memory and other.memory and self.memory.concat(other.memory)
        if self.shortlist is not None and other.shortlist is not None:
            self.shortlist = torch.cat([self.shortlist, other.shortlist])
        self.rows = torch.cat([self.rows, other.rows])


@dataclass(eq=False)
class Newcomer:
    """A request that has its rows but still reads its prefix. memory: its own row of one."""

    request: Request
    memory: Any
    unread: Unread


@dataclass(eq=False)
class Leaver:
    """A request whose search is over, and whose outputs are read once more for their states.

    Reading them gives the same bits as writing them did, so that no search has to keep the states of what it finished.
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
        self._bos, self._eos = model.config.decoder.bos_token_id, model.config.decoder.eos_token_id
        self._edges = edges or WordEdges.none(model.config.decoder.vocab_size, self._model.device)
        self._max_positions_per_step = max_positions_per_step
        self._row_floor = row_floor
        self._waiting: Waiting[Request] = Waiting()
        self._newcomers: list[Newcomer] = []
        self._leavers: list[Leaver] = []
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

    @property
    def num_rows(self) -> int:
        """Decoder rows in use, or held for those that read their prefixes, or their outputs again."""
        return sum(request.params.width for request in self._live())

    @property
    def prefill_tokens(self) -> tuple[int, int]:
        """Tokens read outside the search so far, and those that were not since others began alike."""
        return self._prefill.tokens_read, self._prefill.tokens_saved

    def _live(self) -> Iterator[Request]:
        """The requests that have rows."""
        yield from (newcomer.request for newcomer in self._newcomers)
        yield from (leaver.request for leaver in self._leavers)
        for lane in self._lanes.values():
            yield from lane.requests

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError where it could never be answered."""
        self.check(request)
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
                f"max_new_tokens is {request.params.max_new_tokens}, which is more than this engine can hold; lower it",
                param="max_new_tokens",
                code="limit_exceeded",
            )
        for name in ("output_attentions", "coverage_penalty"):
            if getattr(request.params, name) and not self._model.output_attentions:
                raise InputError(f"{name} needs attention, which this model has not; leave it out", param=name)
        if request.room * self.num_details(request) * self.max_rows > MAX_DETAILS:
            raise InputError(
                f"max_new_tokens is {request.params.max_new_tokens}, which is more than this engine can hold with "
                "top_logprobs or output_attentions; lower it",
                param="max_new_tokens",
                code="limit_exceeded",
            )
        if request.state:
            self._check_state(request, request.state)

    def num_details(self, request: Request) -> int:
        """Numbers that are kept of each token beside it: alternatives with their log-probabilities, and weights."""
        grid = self._model.config.grid
        positions = grid[0] * grid[1] if grid else 0 if request.inputs is None else len(request.inputs)
        return 2 * request.params.top_logprobs + positions * request.params.output_attentions

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
        self._waiting.remove(request_id)
        self._drop({request_id})

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for all live requests."""
        events: list[Event] = self._expire()
        self._admit()
        self._read()
        events += self._leave()
        if self._lanes:
            self._advance()
            events += self._retire()
        return events

    def _expire(self) -> list[Event]:
        now = time.monotonic()
        late = [request.id for request in self._waiting.expired(now)]
        passed = {request.id for request in self._live() if request.deadline is not None and request.deadline <= now}
        late += self._drop(passed) if passed else []
        return [Failed(name, DeadlineError("the deadline passed before the answer was ready")) for name in late]

    def _drop(self, ids: Set[str]) -> list[str]:
        """Remove live requests; returns the ids of those that were there."""
        dropped = [request.id for request in self._live() if request.id in ids]
        self._newcomers = [newcomer for newcomer in self._newcomers if newcomer.request.id not in ids]
        self._leavers = [leaver for leaver in self._leavers if leaver.request.id not in ids]
        for lane in list(self._lanes.values()):
            keep = [r for r, request in enumerate(lane.requests) if request.id not in ids]
            if len(keep) < len(lane.requests):
                self._keep(lane, keep)
        return dropped

    def _keep(self, lane: Lane, keep: Sequence[int]) -> None:
        if not keep:
            del self._lanes[lane.key]
        elif len(keep) < len(lane.requests):
            lane.select(keep)
            lane.rules = self._rules(lane.requests)

    # -- admit ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take waiting requests in their turn while rows and the budget of positions last.

        A wide request at the head waits for rows to free. Until then only those go before it whose turn is earlier by
        the order of `Waiting`: a higher priority, a client with fewer rows, an earlier deadline.
        """
        if not self._waiting:
            return
        taken: list[Request] = []
        rows, positions = self.max_rows - self.num_rows, self._max_positions_per_step
        rows_of = self._rows_by_client()
        while (request := self._waiting.head(rows_of)) and request.params.width <= rows:
            cost = self._positions(request)
            if taken and cost > positions:
                break
            self._waiting.take(request)
            rows, positions = rows - request.params.width, positions - cost
            rows_of[request.client] += request.params.width
            taken.append(request)
        for group in grouped(taken, self._positions):
            self._admit_group(group)

    def _rows_by_client(self) -> Counter[str]:
        rows: Counter[str] = Counter()
        for request in self._live():
            rows[request.client] += request.params.width
        return rows

    def _admit_group(self, group: Sequence[Request]) -> None:
        """Requests of one padded length: begin together, then each into its lane, or first to read its prefix."""
        memory, state = self._begin(group)
        for r, request in enumerate(group):
            if request.prefix:
                row = torch.tensor([r], device=self._device)
                # The last token of a prefix is not read here: it is what the first step reads.
                tokens = (self._bos, *request.prefix[:-1])
                if saved := request.state:
                    unread = Unread(tokens, saved.state(state.width).to(self._device), len(saved.tokens))
                else:
                    unread = Unread(tokens, state.select(row), shared=request.inputs is None)
                self._newcomers.append(Newcomer(request, memory and memory.select(row), unread))
        ready = [r for r, request in enumerate(group) if not request.prefix]
        self._join([group[r] for r in ready], memory, state, ready)

    def _begin(self, group: Sequence[Request]) -> tuple[Any, State]:
        """Encode requests of one padded length: memory and start state, a row each.

        Rows are padded to the floor with copies of the first, so that none gets other bits when it comes alone.
        """
        padded = [*group, *[group[0]] * (self._row_floor - len(group))]
        memory = None
        if padded[0].inputs is not None:
            memory = self._model.encode(*pad_inputs([r.inputs for r in padded if r.inputs is not None], self._device))
        return memory, self._model.start(memory, len(padded))

    def _read(self) -> None:
        """Some tokens more of what is to be read; those who have read their prefixes join their lanes."""
        leaving = [unread for leaver in self._leavers for unread in leaver.unread]
        self._prefill.read([*leaving, *(newcomer.unread for newcomer in self._newcomers)])
        ready = [newcomer for newcomer in self._newcomers if newcomer.unread.done]
        self._newcomers = [newcomer for newcomer in self._newcomers if not newcomer.unread.done]
        for group in grouped(ready, lambda newcomer: self._positions(newcomer.request)):
            memories = [newcomer.memory for newcomer in group if newcomer.memory]
            memory = reduce(lambda one, two: one.concat(two), memories) if memories else None
            state = State(torch.cat([newcomer.unread.state.values for newcomer in group]))
            self._join([newcomer.request for newcomer in group], memory, state, range(len(group)))

    def _join(self, requests: Sequence[Request], memory: Any, state: State, rows: Sequence[int]) -> None:
        """Put requests of one padded length, which stand at `rows` in memory and state, into their lanes."""
        keys = [self._key(request) for request in requests]
        for group in grouped(range(len(requests)), keys.__getitem__):
            index = torch.tensor([rows[i] for i in group], device=self._device)
            self._join_lane([requests[i] for i in group], memory, state, index)

    def _join_lane(self, requests: list[Request], memory: Any, state: State, index: Tensor) -> None:
        """Put requests of one lane key, which stand at `index` in memory and state, into their lane."""
        key = self._key(requests[0])
        first = self._state.num_rows
        self._state = self._state.concat(state.select(index)) if first else state.select(index)
        rows = first + torch.arange(len(requests), device=self._device)[:, None].expand(-1, key.width)
        memory = memory.select(index).padded(key.positions) if memory and key.positions else None
        lane = Lane(
            key,
            requests,
            self._start_search(key, requests, memory and memory.mask),
            memory,
            self._shortlists(requests, key.shortlist),
            rows,
            self._rules(requests),
            [[0] * key.width for _ in requests],
            [state.select(row) if r.return_state else None for r, row in zip(requests, index[:, None], strict=True)],
        )
        if key in self._lanes:
            self._lanes[key].join(lane)
            self._lanes[key].rules = self._rules(self._lanes[key].requests)
        else:
            self._lanes[key] = lane

    def _start_search(self, key: LaneKey, requests: Sequence[Request], mask: Tensor | None) -> Beams | Samples:
        params = [request.params for request in requests]
        prefixes = [request.prefix for request in requests]
        if key.beams:
            return Beams.begin(params, prefixes, self._bos, mask).to(self._device)
        seeds, (steps, outputs) = [r.seed for r in requests], zip(*(r.first_draw for r in requests), strict=True)
        return Samples.begin(params, prefixes, self._bos, seeds, steps, outputs, mask).to(self._device)

    def _shortlists(self, requests: Sequence[Request], length: int) -> Tensor | None:
        if not length:
            return None
        lists = torch.full((len(requests), length), PAD)
        for row, request in zip(lists, requests, strict=True):
            assert request.shortlist is not None, "requests of a lane have one all, or none has"
            row[: len(request.shortlist)] = request.shortlist
        return lists.to(self._device)

    def _rules(self, requests: Sequence[Request]) -> Rules:
        return Rules(
            [r.params for r in requests],
            [r.bad_words for r in requests],
            [r.force_words for r in requests],
            self._edges,
            self._eos,
            self._device,
        )

    def _key(self, request: Request) -> LaneKey:
        positions = 0
        if self._model.attends and request.inputs is not None:
            positions = bucket(len(request.inputs), LANES) if has_steps(request.inputs) else 1
        params = request.params
        return LaneKey(
            params.num_beams > 1,
            params.width,
            positions,
            0 if request.shortlist is None else bucket(len(request.shortlist), SHORTLISTS),
            params.top_logprobs > 0,
            params.output_attentions,
            params.coverage_penalty > 0,
        )

    def _positions(self, request: Request) -> int:
        """Memory positions of a request, padding included."""
        if request.inputs is None:
            return 0
        return bucket(len(request.inputs)) if has_steps(request.inputs) else 1

    # -- advance and retire --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One token for every row: move, step, then select lane by lane."""
        lanes = list(self._lanes.values())
        rows = torch.cat([lane.rows.flatten() for lane in lanes])
        tokens = torch.cat([lane.search.last_tokens.flatten() for lane in lanes])
        if (missing := self._row_floor - len(rows)) > 0:  # padding rows copy a valid one
            rows, tokens = _repeat_first(rows, missing), _repeat_first(tokens, missing)
        groups = [Group(len(lane.requests), lane.key.width, lane.memory, lane.shortlist) for lane in lanes]
        logits, self._state, weights = self._model.step(tokens, self._state.select(rows), groups)
        first = 0
        for lane, looked in zip(lanes, weights or repeat(None, len(lanes)), strict=True):
            count = lane.rows.numel()
            lane_logits, history = logits[first : first + count].view(*lane.rows.shape, -1), lane.search.history
            standing = lane.rules.standing(history)
            lane_logits, constrained = lane.rules.apply(lane_logits, history, standing)
            logprobs = lane_logits.log_softmax(-1)
            lane.search, parents = lane.search.advance(logprobs, constrained, self._eos, standing, looked)
            here = first + torch.arange(count, device=self._device).view_as(lane.rows)
            lane.rows = here.gather(1, parents)
            first += count

    def _retire(self) -> list[Event]:
        """Report what is new, and let the finished go."""
        events: list[Event] = []
        for lane in list(self._lanes.values()):
            for r, request in enumerate(lane.requests):
                if request.watch or request.stream:
                    events += self._report(lane, r, request)
            finished = lane.search.finished.tolist()
            if any(finished):
                ended = [r for r, done in enumerate(finished) if done]
                events += [event for r in ended if (event := self._finish(lane, r))]
                self._keep(lane, [r for r, done in enumerate(finished) if not done])
        return events

    def _finish(self, lane: Lane, r: int) -> Finished | None:
        """The answer of a request of a lane; none yet where the states of its outputs are to be read."""
        request, outputs, begun = lane.requests[r], lane.search.results(r), lane.begun[r]
        if begun is None:
            return Finished(request.id, outputs)
        unread = []
        for output in outputs:
            kept = self._kept(output)
            unread.append(Unread((self._bos, *kept)[: len(kept)], begun, len(request.prefix)))
        self._leavers.append(Leaver(request, outputs, unread))
        return None

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

    def _report(self, lane: Lane, r: int, request: Request) -> Iterable[Event]:
        for index, tokens in enumerate(lane.search.settled(r)):
            new = tokens[lane.sent[r][index] :]
            if not new:
                continue
            lane.sent[r][index] = len(tokens)
            if request.watch and isinstance(lane.search, Samples) and request.watch(index, tokens):
                lane.search = lane.search.stop(r, index)
            if request.stream:
                yield Progress(request.id, index, new)


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
    """The padded length for an input: the next of the sizes, or the next multiple of the last one."""
    for size in sizes:
        if length <= size:
            return size
    return -(-length // sizes[-1]) * sizes[-1]


def has_steps(inputs: Tensor) -> bool:
    """Whether axis 0 of one request's inputs is time: token ids, features and frames, but not an image (C, H, W)."""
    return inputs.dim() != 3


def pad_inputs(inputs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Inputs of one bucket -> (B, S, ...) padded with zeros to the bucket's length, and lengths (B,)."""
    if not has_steps(inputs[0]):
        return torch.stack(list(inputs)).to(device), None
    lengths = [len(one) for one in inputs]
    padded = inputs[0].new_zeros(len(inputs), bucket(max(lengths)), *inputs[0].shape[1:])
    for row, one in zip(padded, inputs, strict=True):
        row[: len(one)] = one
    return padded.to(device), torch.tensor(lengths, device=device)


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items with equal keys together, groups in order of the key, order kept within each."""
    return [list(group) for _, group in groupby(sorted(items, key=key), key=key)]


def _repeat_first(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x[:1].expand(count)])
