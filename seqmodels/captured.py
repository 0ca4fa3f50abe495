"""CapturedStepper: a stepper whose steps are CUDA graphs, since a GPU runs a step's small kernels faster than a CPU
launches them one by one.

A graph computes fixed shapes at fixed addresses. So the requests of a lane are padded to few numbers with copies of its
first, what a step reads is copied to where the graph reads it, and what it gives is copied out before the next step
overwrites it. Captured is all that comes before the logits, which are a product or two, of the rows there are. Knows
shapes and addresses; knows no equation.
"""

import logging
import os
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqmodels.state import Memory, State
from seqmodels.stepper import Decodes, Features, Group, Groups, Shortlisted, Stepped, Stepper

Work = Callable[[], Features]
Capture = Callable[[Work], tuple[Features, Callable[[], object]]]  # -> where the results will be, and what makes them

SWITCH = "SEQMODELS_CUDA_GRAPHS"  # the environment variable; 1 switches capturing on
STEPS_BEFORE = 8  # that a shape takes without a graph: capturing takes as long as many steps, and many shapes come once
MAX_GRAPHS = 32  # the one not used for the longest makes way
MAX_COUNTS = 10_000  # of shapes seen; forgetting them only puts captures off
WARM_UPS = 3  # calls before a capture, in which libraries set themselves up; as torch's documentation does

logger = logging.getLogger(__name__)


def captured(stepper: Stepper) -> Decodes:
    """The stepper with its steps captured, on a GPU where SEQMODELS_CUDA_GRAPHS is 1; elsewhere as it is.

    Off unless asked for, until a service has run with it; see docs/performance.md.
    """
    if stepper.device.type != "cuda" or os.environ.get(SWITCH) != "1":
        return stepper
    return CapturedStepper(stepper, CudaCapture(stepper.device))


class CapturedStepper:
    """A Stepper with the same calls and the same answers. Not thread-safe: one thread owns it."""

    def __init__(
        self, stepper: Stepper, capture: Capture, steps_before: int = STEPS_BEFORE, max_graphs: int = MAX_GRAPHS
    ) -> None:
        self.config, self.device = stepper.config, stepper.device
        self.vocab_size, self.output_size = stepper.vocab_size, stepper.output_size
        self.attends, self.output_attentions = stepper.attends, stepper.output_attentions
        self.reads_memory, self.state_width = stepper.reads_memory, stepper.state_width
        self._stepper = stepper
        self._capture: Capture | None = capture  # None once it has failed
        self._steps_before, self._max_graphs = steps_before, max_graphs
        self._steps: Counter[Shape] = Counter()
        self._graphs: OrderedDict[Shape, _Graph] = OrderedDict()
        # Graphs share what they read, which is large. It lives as long as one of them.
        self._memories: weakref.WeakValueDictionary[tuple[int, int, int], _StaticMemory] = weakref.WeakValueDictionary()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> Memory:
        return self._stepper.encode(inputs, lengths)

    def start(self, memory: Memory | None, rows: int) -> State:
        return self._stepper.start(memory, rows)

    def shorten(self, words: Tensor) -> Shortlisted:
        return self._stepper.shorten(words)

    def read(self, tokens: Tensor, lengths: Tensor, state: State, groups: Groups = ()) -> State:
        return self._stepper.read(tokens, lengths, state, groups)

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: State, groups: Groups) -> Stepped:
        """As Stepper.step."""
        # Without attention a step knows only rows.
        seen = groups if self.attends else [Group(len(tokens), 1)]
        graph = self._graph(tokens, state, seen)
        if graph is None:
            return self._stepper.step(tokens, state, groups)
        graph.load(tokens, state, seen)
        outputs, after, weights = graph.run()
        return self._stepper.logits(outputs, groups), after, weights

    def _graph(self, tokens: Tensor, state: State, groups: Groups) -> "_Graph | None":
        """The graph of this shape, captured where it has come often enough; None where the step is to run as it is."""
        shape = Shape.of(len(tokens), groups)
        if graph := self._graphs.get(shape):
            self._graphs.move_to_end(shape)
            return graph
        if self._capture is None or not self._due(shape):
            return None
        try:
            graph = _Graph(self._stepper, shape, self._memories_of(shape))
            graph.load(tokens, state, groups)
            graph.capture(self._capture)
        except RuntimeError as error:  # no memory left, or a kernel that cannot be captured
            logger.warning("CUDA graphs are off, since a step could not be captured: %s", error)
            self._capture = None
            self._graphs.clear()
            return None
        self._graphs[shape] = graph
        if self.num_graphs > self._max_graphs:  # after the capture, which has waited until no graph runs
            self._graphs.popitem(last=False)
        return graph

    def _due(self, shape: "Shape") -> bool:
        self._steps[shape] += 1
        if len(self._steps) > MAX_COUNTS:
            self._steps.clear()
        if self._steps[shape] <= self._steps_before:
            return False
        del self._steps[shape]  # once it has made way for others, it has to come as often again
        return True

    def _memories_of(self, shape: "Shape") -> "list[_StaticMemory | None]":
        keys = [(index, lane.num_requests, lane.positions) for index, lane in enumerate(shape.lanes)]
        return [self._memories.setdefault(key, _StaticMemory()) if key[2] else None for key in keys]


@dataclass(frozen=True)
class LaneShape:
    """Requests, padding included; rows of each; positions of their memories, 0 without."""

    num_requests: int
    width: int
    positions: int


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for. rows_beyond: those of no lane, with which the engine pads small batches."""

    lanes: tuple[LaneShape, ...]
    rows_beyond: int

    @classmethod
    def of(cls, num_rows: int, groups: Groups) -> "Shape":
        lanes = [LaneShape(_padded(g.num_requests), g.width, g.memory.mask.shape[1] if g.memory else 0) for g in groups]
        return cls(tuple(lanes), num_rows - sum(group.num_requests * group.width for group in groups))

    @property
    def num_rows(self) -> int:
        return sum(lane.num_requests * lane.width for lane in self.lanes) + self.rows_beyond


def _padded(count: int) -> int:
    """The next power of two; the next multiple of 64 from there on, so that large batches have little padding."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


class _Places:
    """Which request and which row stands at each place of a shape, and where the rows stand that are not padding."""

    def __init__(self, shape: Shape, counts: Sequence[int], device: torch.device) -> None:
        """counts: the requests that each lane has."""
        self.counts = counts
        requests: list[list[int]] = []
        rows: list[int] = []
        back: list[int] = []
        first = 0
        for lane, count in zip(shape.lanes, counts, strict=True):
            missing, size = lane.num_requests - count, count * lane.width
            requests.append([*range(count), *[0] * missing])
            back += range(len(rows), len(rows) + size)
            rows += [*range(first, first + size), *[*range(first, first + lane.width)] * missing]
            first += size
        back += range(len(rows), len(rows) + shape.rows_beyond)
        rows += range(first, first + shape.rows_beyond)
        self.requests = [torch.tensor(one, device=device) for one in requests]
        self.rows, self.back = torch.tensor(rows, device=device), torch.tensor(back, device=device)


class _StaticMemory:
    """A memory at one address. Filled again only where the lane's own is another: a Memory never changes, and is
    replaced when requests join or leave."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self._filled_from: Callable[[], Memory | None] = lambda: None

    def fill(self, memory: Memory, requests: Tensor) -> None:
        """requests (R,): whose row of the memory stands in each row."""
        if self._filled_from() is memory:
            return
        padded = memory.select(requests)
        if self.memory is None:
            self.memory = padded
        else:
            self.memory.put(torch.arange(len(requests), device=requests.device), padded)
        self._filled_from = weakref.ref(memory)  # weak, so that no graph keeps a lane's memory alive


class _Graph:
    """The captured features of one shape, with what they are computed from."""

    def __init__(self, stepper: Stepper, shape: Shape, memories: Sequence[_StaticMemory | None]) -> None:
        self._stepper, self._shape, self._memories = stepper, shape, memories
        self._tokens = torch.zeros(shape.num_rows, dtype=torch.int64, device=stepper.device)
        self._state = State(torch.zeros(shape.num_rows, stepper.state_width, device=stepper.device))
        self._places = _Places(shape, [lane.num_requests for lane in shape.lanes], stepper.device)

    def load(self, tokens: Tensor, state: State, groups: Groups) -> None:
        """Copy what the step reads to where the graph reads it."""
        counts = [group.num_requests for group in groups]
        if counts != self._places.counts:
            self._places = _Places(self._shape, counts, self._stepper.device)
        for static, group, requests in zip(self._memories, groups, self._places.requests, strict=True):
            if static:
                static.fill(group.memory, requests)
        torch.index_select(tokens, 0, self._places.rows, out=self._tokens)
        torch.index_select(state.values, 0, self._places.rows, out=self._state.values)

    def capture(self, capture: Capture) -> None:
        """Once, after the first `load`."""
        groups = [
            Group(lane.num_requests, lane.width, static and static.memory)
            for lane, static in zip(self._shape.lanes, self._memories, strict=True)
        ]
        work = partial(self._stepper.features, self._tokens, self._state, groups)  # does not hold this graph itself
        self._features, self._replay = capture(work)

    def run(self) -> Features:
        """The features of what was loaded, without the padding. Copies, since the next run writes over these."""
        self._replay()
        outputs, state, weights = self._features
        counts = self._places.counts[: len(weights)]
        looked = [lane[:count].clone() for lane, count in zip(weights, counts, strict=True)]
        return outputs.index_select(0, self._places.back), state.select(self._places.back), looked


class CudaCapture:
    """Captures work as CUDA graphs. They share one pool of memory for what lies between, since no two run at once; the
    results of each stay its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Features, Callable[[], object]]:
        """Raises RuntimeError where torch or the driver cannot capture it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            with torch.cuda.stream(before):  # comes back here even where a capture breaks off
                self._warm_up(work, before)
                # Calls that other threads make meanwhile are none of this capture's business.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    features = work()
        return features, graph.replay

    def _warm_up(self, work: Work, before: torch.cuda.Stream) -> None:
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        before.wait_stream(self._stream)
