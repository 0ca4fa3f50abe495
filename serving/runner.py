"""Runner: one thread that turns the engines of every model.

In: a bounded, thread-safe queue, drained once each turn. Out: one call of `deliver` per turn, with every event of
that turn. Knows requests by their id and pipelines by name; knows no HTTP, no event loop and no text.

A turn is: take in what has arrived, let every pipeline with work take one step, deliver. Deadlines are the pipelines'.
Each request that was accepted gets exactly one Finished or Failed, unless it is cancelled.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from seqmodels.decoding.request import Event, Failed, Finished
from seqmodels.errors import QueueFullError, SeqModelsError
from serving.errors import ClosingError, EngineError

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5  # how long an idle thread sleeps before it says again that it is alive
FAILURES_IN_A_ROW = 8  # failed steps without a good one between, after which a model counts as broken


class Prepared(Protocol):
    @property
    def id(self) -> str: ...


class Engine(Protocol):
    """The part of a Pipeline that the thread drives."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, job: Any) -> None: ...
    def step(self) -> list[Event]: ...
    def cancel(self, request_id: str) -> None: ...
    def load(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Order:
    """One prepared request on its way to one model."""

    model: str
    job: Prepared


@dataclass(frozen=True)
class _Cancel:
    request_id: str


Deliver = Callable[[list[Event]], None]


E = TypeVar("E", bound=Engine)


class Runner(Generic[E]):
    """Turns `pipelines` in a thread of its own, from `start` to `stop`. Other methods may be called by any thread."""

    def __init__(self, pipelines: Mapping[str, E], *, max_requests: int = 1024, stall_after_s: float = 30.0) -> None:
        self.pipelines = pipelines
        self.max_requests = max_requests
        self.stall_after_s = stall_after_s
        self._deliver: Deliver = _nobody
        self._inbox: SimpleQueue[Order | _Cancel | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, Order] = {}  # accepted and not yet ended; changed under the lock
        self._num_reserved = 0  # places of calls that are not requests yet; changed under the lock
        self._running: dict[str, Order] = {}  # given to a pipeline and not yet ended; of the thread alone
        self._failures = dict.fromkeys(pipelines, 0)
        self._loads: dict[str, dict[str, int]] = {name: pipeline.load() for name, pipeline in pipelines.items()}
        self._closing = False
        self._stop_at = float("inf")
        self._last_turn = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)

    # -- for any thread

    def start(self, deliver: Deliver) -> None:
        """Begin to turn. `deliver` is called in the runner's thread and should only pass the events on."""
        self._deliver = deliver
        self._last_turn = time.monotonic()
        self._thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one place for a call while its body is read and prepared. Raises QueueFullError or ClosingError."""
        with self._lock:
            self._check_room(1)
            self._num_reserved += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_reserved -= 1

    def submit(self, orders: Sequence[Order]) -> None:
        """Accept all the orders or, raising QueueFullError or ClosingError, none."""
        with self._lock:
            self._check_room(len(orders))
            self._open.update((order.job.id, order) for order in orders)
        for order in orders:
            self._inbox.put(order)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests, at the next turn and without an event; those that have ended are not minded."""
        for request_id in request_ids:
            self._inbox.put(_Cancel(request_id))

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, let what runs finish within `drain_s`, fail the rest, end the thread."""
        with self._lock:
            self._closing = True
        self._stop_at = time.monotonic() + drain_s
        self._inbox.put(None)  # wake it
        if self._thread.is_alive():
            self._thread.join(drain_s + self.stall_after_s)

    @property
    def is_turning(self) -> bool:
        """Whether the thread is alive and has begun a turn not long ago."""
        return self._thread.is_alive() and time.monotonic() - self._last_turn < self.stall_after_s

    @property
    def broken_models(self) -> list[str]:
        """Models whose every recent step failed."""
        return [name for name, count in self._failures.items() if count >= FAILURES_IN_A_ROW]

    @property
    def num_open(self) -> int:
        """Places taken: requests accepted and not yet ended, and calls in preparation."""
        return len(self._open) + self._num_reserved

    @property
    def loads(self) -> dict[str, dict[str, int]]:
        """The gauges of each pipeline, as of the last turn."""
        return self._loads

    def _check_room(self, count: int) -> None:
        if self._closing:
            raise ClosingError
        if self.num_open + count > self.max_requests:
            raise QueueFullError(
                f"{self.num_open} of {self.max_requests} places are taken and this request needs {count}; "
                "try again later"
            )

    # -- in the thread

    def _run(self) -> None:
        while not self._is_over():
            self._last_turn = time.monotonic()
            events = self.turn(wait_s=IDLE_WAIT_S)
            if events:
                self._deliver(events)
        with self._lock:
            unfinished = list(self._open)
        if unfinished:
            self._deliver(self._fail(unfinished, ClosingError()))

    def _is_over(self) -> bool:
        return self._closing and (not self._open or time.monotonic() >= self._stop_at)

    def turn(self, wait_s: float = 0.0) -> list[Event]:
        """One turn; if there is nothing to do, wait so long for something to arrive."""
        events = self._take_in(wait_s)
        for name, pipeline in self.pipelines.items():
            if pipeline.has_work:
                events += self._step(name, pipeline)
            self._loads[name] = pipeline.load()
        return events

    def _take_in(self, wait_s: float) -> list[Event]:
        events: list[Event] = []
        busy = any(pipeline.has_work for pipeline in self.pipelines.values())
        try:
            message = self._inbox.get(block=not busy and wait_s > 0, timeout=wait_s)
            while True:
                if isinstance(message, Order):
                    events += self._begin(message)
                elif isinstance(message, _Cancel):
                    self._drop(message.request_id)
                message = self._inbox.get_nowait()
        except Empty:
            return events

    def _begin(self, order: Order) -> list[Event]:
        try:
            self.pipelines[order.model].submit(order.job)
        except SeqModelsError as error:
            return self._fail([order.job.id], error)
        except Exception:
            logger.exception("submit failed: model %s", order.model)
            return self._fail([order.job.id], EngineError())
        self._running[order.job.id] = order
        return []

    def _step(self, name: str, pipeline: E) -> list[Event]:
        try:
            events = pipeline.step()
        except Exception:
            logger.exception("step failed: model %s", name)
            self._failures[name] += 1
            return self._fail([id for id, order in self._running.items() if order.model == name], EngineError())
        self._failures[name] = 0
        return [event for event in events if self._passes_on(event)]

    def _passes_on(self, event: Event) -> bool:
        """Note an end; false for an event of a request that has ended here already."""
        is_running = event.request_id in self._running
        if isinstance(event, Finished | Failed):
            self._close(event.request_id)
        return is_running

    def _fail(self, request_ids: Sequence[str], error: SeqModelsError) -> list[Event]:
        for request_id in request_ids:
            self._drop(request_id)
        return [Failed(request_id, error) for request_id in request_ids]

    def _drop(self, request_id: str) -> None:
        """End a request, wherever it is, and free what it holds."""
        order = self._close(request_id)
        if order is None:
            return
        try:
            self.pipelines[order.model].cancel(request_id)
        except Exception:  # a pipeline that just failed may fail at this too
            logger.exception("cancel failed: model %s", order.model)

    def _close(self, request_id: str) -> Order | None:
        """Forget a request; its order, if a pipeline was working on it."""
        with self._lock:
            self._open.pop(request_id, None)
        return self._running.pop(request_id, None)


def _nobody(events: list[Event]) -> None:
    """Where events go before `start`."""
