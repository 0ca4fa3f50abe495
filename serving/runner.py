"""Runner: one thread that turns the engines of every model.

In: a bounded, thread-safe queue, drained once each turn. Out: one call of `deliver` per turn, with every event of
that turn. Knows requests by their id and the models that serve them; knows no HTTP, no event loop and no text.

A turn is: take in what has arrived, let every model with work take one step, deliver. Deadlines are the pipelines'.
Each request that was accepted gets exactly one Finished or Failed, unless it is cancelled. Models come and go while
others are turned; one that is replaced answers what it was asked and then is let go.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from seqmodels.decoding.request import Event, Failed, Finished, Times
from seqmodels.decoding.waiting import Bounds
from seqmodels.errors import QueueFullError, SeqModelsError
from serving.errors import ClosingError, EngineError
from serving.pace import Pace, Turn

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5  # how long an idle thread sleeps before it says again that it is alive
FAILURES_IN_A_ROW = 8  # failed steps without a good one between, after which a model counts as broken


class Wanted(Protocol):
    """What decides when a request has its turn, and until when its answer is of use."""

    @property
    def deadline(self) -> float | None: ...
    @property
    def priority(self) -> int: ...
    @property
    def client(self) -> str: ...


class Prepared(Wanted, Protocol):
    @property
    def id(self) -> str: ...
    @property
    def times(self) -> Times: ...


class Engine(Protocol):
    """The part of a Pipeline that the thread drives."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, job: Any) -> None: ...
    def step(self, bounds: Bounds) -> list[Event]: ...
    def cancel(self, request_id: str) -> None: ...
    def load(self) -> dict[str, int]: ...
    def waiting(self) -> Mapping[tuple[int, str], list[float]]: ...


Deliver = Callable[[list[Event]], None]


@dataclass(eq=False)
class Model:
    """A pipeline under the name that clients use. What else is here belongs to the runner."""

    name: str
    pipeline: Engine
    failures: int = 0  # failed steps since the last good one
    load: dict[str, int] = field(init=False)  # its gauges, as of the last turn
    num_running: int = 0  # requests given to the pipeline and not yet ended
    step_s: float = 0.0  # what its last step took
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.load = self.pipeline.load()

    def last_turn(self, num_running: int, rows_before: int) -> Turn:
        """What its pace is told of the turn that has just ended, in which so many requests ran or waited, with so many
        rows at its beginning."""
        waiting = self.pipeline.waiting()
        with_rows = max(0, num_running - sum(map(len, waiting.values())))
        rows = max(rows_before, self.load["rows_live"])  # none in a forward pass
        free = max(0.0, self.pace.share * self.load["rows_total"] - self.load["rows_live"])
        room = free * with_rows / rows if rows and not waiting else 0.0
        return Turn(with_rows, self.num_running, waiting, room, not rows, self.step_s)

    @property
    def is_broken(self) -> bool:
        return self.failures >= FAILURES_IN_A_ROW


M = TypeVar("M", bound=Model)


@dataclass(eq=False)
class Order(Generic[M]):
    """One prepared request on its way to one model. was_estimated: whether the time that it will take was, when it was
    accepted."""

    model: M
    job: Prepared
    was_estimated: bool = False


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Leave(Generic[M]):
    model: M


class Runner(Generic[M]):
    """Turns `models` in a thread of its own, from `start` to `stop`. Other methods may be called by any thread."""

    def __init__(
        self,
        models: Iterable[M] = (),
        *,
        max_requests: int = 1024,
        stall_after_s: float = 30.0,
        stepped: Callable[[str, float], None] = lambda model, seconds: None,
    ) -> None:
        """stepped: called in the thread after each good step of a model, with the seconds that it took."""
        self.models = {
            model.name: model for model in models
        }  # never changed, only replaced: read it as often as needed
        self.max_requests = max_requests
        self.stall_after_s = stall_after_s
        self._stepped = stepped
        self._deliver: Deliver = _nobody
        self._inbox: SimpleQueue[Order[M] | _Cancel | _Leave[M] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, Order[M]] = {}  # accepted and not yet ended; changed under the lock
        self._num_reserved = 0  # places of calls that are not requests yet; changed under the lock
        self._running: dict[str, Order[M]] = {}  # given to a pipeline and not yet ended; of the thread alone
        self._arrived: list[Order[M]] = []  # in this turn; of the thread alone
        self._leaving: list[M] = []  # no longer in `models`, and still at work; of the thread alone
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

    def serve(self, model: M) -> None:
        """Turn a model from now on. One of the same name is let go once it has answered what it was asked."""
        with self._lock:
            replaced = self.models.get(model.name)
            self.models = {**self.models, model.name: model}
        if replaced:
            self._inbox.put(_Leave(replaced))

    def let_go(self, name: str) -> None:
        """No longer turn the model of that name, once it has answered what it was asked."""
        with self._lock:
            leaving = self.models[name]
            self.models = {other: model for other, model in self.models.items() if other != name}
        self._inbox.put(_Leave(leaving))

    def check_time(self, models: Collection[M], wanted: Wanted, preparing_s: float) -> None:
        """Of a call that will ask one of the models, and will be prepared in so many seconds: raises QueueFullError if
        none of them can answer it in time, and ClosingError."""
        self._check_open()
        if models:
            _check_time(models, wanted, 1, preparing_s)

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

    @contextmanager
    def on_the_way(self, models: Collection[M], wanted: Wanted) -> Iterator[None]:
        """Count a call while it is prepared among those that go before others, where it can ask one model only."""
        if len(models) != 1:
            yield
            return
        (pace,) = (model.pace for model in models)
        turn = (wanted.priority, wanted.client, wanted.deadline)
        pace.comes(*turn)
        try:
            yield
        finally:
            pace.came(*turn)

    def submit(self, orders: Sequence[Order[M]]) -> None:
        """Accept all the orders or, raising QueueFullError or ClosingError, none."""
        self._check_open()
        if orders:  # of one call, and so all alike in this
            seconds = _check_time([orders[0].model], orders[0].job, len(orders), 0.0)
            for order in orders:
                order.was_estimated = seconds > 0
        with self._lock:
            self._check_room(len(orders))
            self._open.update((order.job.id, order) for order in orders)
            for order in orders:
                order.model.pace.comes(order.job.priority, order.job.client, order.job.deadline)
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
        return [model.name for model in self.models.values() if model.is_broken]

    @property
    def num_open(self) -> int:
        """Places taken: requests accepted and not yet ended, and calls in preparation."""
        return len(self._open) + self._num_reserved

    def _check_open(self) -> None:
        if self._closing:
            raise ClosingError

    def _check_room(self, count: int) -> None:
        self._check_open()
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
        began = time.monotonic()
        models = (*self.models.values(), *self._leaving)
        running = [model.num_running for model in models]
        rows = [model.load["rows_live"] for model in models]
        for index, model in enumerate(models):
            if model.pipeline.has_work:
                stepped = self._step(model)
                running[index] -= sum(isinstance(event, Failed) for event in stepped)  # most had no rows
                events += stepped
            model.load = model.pipeline.load()
        now = time.monotonic()
        for model, num_running, rows_before in zip(models, running, rows, strict=True):
            model.pace.turned(now - began if num_running else None, model.last_turn(num_running, rows_before), now)
        for order in self._arrived:  # not sooner: until then nothing else tells of them
            order.model.pace.came(order.job.priority, order.job.client, order.job.deadline)
        self._arrived.clear()
        self._leaving = [model for model in self._leaving if model.pipeline.has_work and not model.is_broken]
        return events

    def _take_in(self, wait_s: float) -> list[Event]:
        events: list[Event] = []
        busy = any(model.pipeline.has_work for model in (*self.models.values(), *self._leaving))
        try:
            message = self._inbox.get(block=not busy and wait_s > 0, timeout=wait_s)
            while True:
                if isinstance(message, Order):
                    events += self._begin(message)
                elif isinstance(message, _Cancel):
                    self._drop(message.request_id)
                elif isinstance(message, _Leave):
                    self._turn_until_done(message.model)
                message = self._inbox.get_nowait()
        except Empty:
            return events

    def _begin(self, order: Order[M]) -> list[Event]:
        self._arrived.append(order)
        try:
            order.model.pipeline.submit(order.job)
        except SeqModelsError as error:
            return self._fail([order.job.id], error)
        except Exception:
            logger.exception("submit failed: model %s", order.model.name)
            return self._fail([order.job.id], EngineError())
        self._running[order.job.id] = order
        order.model.num_running += 1
        if self.models.get(order.model.name) is not order.model:  # replaced while this request was being prepared
            self._turn_until_done(order.model)
        return []

    def _turn_until_done(self, model: M) -> None:
        if model not in self._leaving:
            self._leaving.append(model)

    def _step(self, model: M) -> list[Event]:
        started_at = time.monotonic()
        try:
            events = model.pipeline.step(model.pace.bounds)
        except Exception:
            logger.exception("step failed: model %s", model.name)
            model.failures += 1
            return self._fail([id for id, order in self._running.items() if order.model is model], EngineError())
        model.failures = 0
        model.step_s = time.monotonic() - started_at
        self._stepped(model.name, model.step_s)
        return [event for event in events if self._passes_on(event)]

    def _passes_on(self, event: Event) -> bool:
        """Note an end; false for an event of a request that has ended here already."""
        if not isinstance(event, Finished | Failed):
            return event.request_id in self._running
        order = self._close(event.request_id, isinstance(event, Finished))
        if order and isinstance(event, Failed) and isinstance(event.error, QueueFullError):
            order.model.pace.given_up(order.was_estimated)
        return order is not None

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
            order.model.pipeline.cancel(request_id)
        except Exception:  # a pipeline that just failed may fail at this too
            logger.exception("cancel failed: model %s", order.model.name)

    def _close(self, request_id: str, is_answered: bool = False) -> Order[M] | None:
        """Forget a request; its order, if a pipeline was working on it."""
        with self._lock:
            self._open.pop(request_id, None)
        order = self._running.pop(request_id, None)
        if order:
            order.model.num_running -= 1
            now = time.monotonic()
            if order.job.deadline is not None and order.job.deadline < now:
                order.model.pace.expired(order.job.times, order.was_estimated, now)
            elif is_answered:
                order.model.pace.finished(order.job.times)
        return order


def _check_time(models: Collection[Model], wanted: Wanted, count: int, preparing_s: float) -> float:
    """In how many seconds one of the models can answer. Raises QueueFullError where none can in time."""
    if wanted.deadline is None:
        return 0.0
    of_model = (wanted.priority, wanted.client, wanted.deadline, count, preparing_s)
    seconds = min(model.pace.seconds(*of_model) for model in models)
    allowed = wanted.deadline - time.monotonic()
    if 0 < allowed < seconds:  # one whose time is over already is told just that
        raise QueueFullError(
            f"an answer would take about {seconds:.1f} s now, and this request can wait {allowed:.1f} s; try "
            "again later, or allow more time",
            seconds - allowed,
        )
    return seconds


def _nobody(events: list[Event]) -> None:
    """Where events go before `start`."""
