"""Service: the asynchronous side of a Runner. From a request body to an answer, or to a stream of pieces.

Knows pools and deadlines; knows no HTTP. Slow pure work runs in a small pool of threads, engine work in the runner's
thread; the event loop passes things on and puts answers into words. Whoever closes a `Call` early frees what it held.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from seqmodels.decoding.request import Event, Failed, Finished, Progress, Scores
from seqmodels.errors import DeadlineError
from serving.models import ServedModel
from serving.pace import Preparing
from serving.runner import Order, Runner
from serving.states import Seal

if TYPE_CHECKING:
    from seqmodels.decoding.search import Hypothesis
    from seqmodels.pipeline import Job

POOL_THREADS = 4
# After a deadline the pipeline has so long to say so itself. Short, for a slow step must not hold the answer back until
# Ray's proxy gives its own (see http.seconds_allowed).
GRACE_S = 0.05

LONG = 5_000  # tokens of an answer that a thread puts into words, and into JSON: some 40 ms
NUMBERS_PER_TOKEN = 8  # so many, of details, take as long to write as one token

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Work:
    """The jobs of one call, for one model. deadline: in `time.monotonic` seconds. exact: of jobs that go on from a
    state, whether they do so to the last bit."""

    model: ServedModel
    jobs: "Sequence[Job]"
    deadline: float
    exact: Mapping[str, bool] = field(default_factory=dict)  # by the job's id


@dataclass(frozen=True)
class Delta:
    """More text for one sequence of one input; told: of a request for logprobs, what is new of its tokens."""

    index: int
    sequence: int
    text: str
    told: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """The results of a call, in the order of its inputs."""

    model: str
    revision: str
    results: list[dict[str, Any]]
    usage: dict[str, int]
    is_long: bool  # so that others would wait while it is written

    def body(self) -> dict[str, Any]:
        return {"model": self.model, "revision": self.revision, "results": self.results, "usage": self.usage}


@contextlib.asynccontextmanager
async def ending_at(deadline: float) -> AsyncIterator[None]:
    """Raises DeadlineError in place of what is still being awaited then, in `time.monotonic` seconds."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineError("the deadline passed before the answer was ready") from None


class Service:
    """Prepares work in a pool, and connects calls with the runner."""

    def __init__(self, runner: Runner[ServedModel], seal: Seal, stream_interval_s: float) -> None:
        """stream_interval_s: the least time from one piece of a stream to the next, after the first."""
        self.runner = runner
        self.seal = seal
        self.stream_interval_s = stream_interval_s
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="prepare")
        self._free_threads = asyncio.Semaphore(POOL_THREADS)
        self.preparing = Preparing()
        self._calls: dict[str, Call] = {}  # by request id; of the event loop alone
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to turn; to be called on the event loop that will make the calls."""
        self._loop = asyncio.get_running_loop()
        self.runner.start(self._deliver)

    async def stop(self, drain_s: float) -> None:
        await asyncio.to_thread(self.runner.stop, drain_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def in_pool(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a slow pure function off the event loop.

        Calls queue here rather than in the pool, because here they leave no body behind when their time is over; a
        thread that is at work for such a call is free only when it is done.
        """
        await self._free_threads.acquire()
        future = self._pool.submit(function, *args, **kwargs)
        future.add_done_callback(lambda _: self._on_loop(self._free_threads.release))
        return await asyncio.wrap_future(future)

    def call(self, work: Work) -> "Call":
        """Hand work to the runner. Raises QueueFullError or ClosingError."""
        call = Call(self, work)
        self.runner.submit([Order(work.model, job) for job in work.jobs])
        self._calls.update((job.id, call) for job in work.jobs)
        return call

    def forget(self, request_ids: Sequence[str]) -> None:
        """Cancel requests that nobody waits for any more."""
        for request_id in request_ids:
            self._calls.pop(request_id, None)
        self.runner.cancel(request_ids)

    def _deliver(self, events: list[Event]) -> None:
        """In the runner's thread: one hand-over to the event loop for all events of a turn."""
        self._on_loop(self._dispatch, events)

    def _on_loop(self, function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """From another thread: have the event loop call a function."""
        assert self._loop is not None, "Service.start has not been called"
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            self._loop.call_soon_threadsafe(partial(function, *args, **kwargs))

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            call = self._calls.get(event.request_id)
            if call is None:
                continue
            if isinstance(event, Finished | Failed):
                del self._calls[event.request_id]
            call.receive(event)


class Call:
    """The requests of one client while the runner has them. Use `answer` or `stream`, once, then `close`."""

    def __init__(self, service: Service, work: Work) -> None:
        self._service = service
        self._work = work
        self._pipeline = work.model.pipeline
        self._position = {job.id: index for index, job in enumerate(work.jobs)}
        self._unfinished = set(self._position)
        self._results: dict[int, Any] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def receive(self, event: Event) -> None:
        """On the event loop: take one event of this call."""
        if isinstance(event, Finished | Failed):
            self._unfinished.discard(event.request_id)
        self._events.put_nowait(event)

    async def answer(self) -> Answer:
        """Wait for every result. Raises the first error, which ends the whole call."""
        async with ending_at(self._ends_at):
            while not self._is_over:
                await self._next()
        return await self._put_into_words()

    async def stream(self) -> AsyncGenerator[Delta | Answer]:
        """Text as it is decided, then the same answer as `answer` gives. The first piece comes at once; then what comes
        within an interval comes together, for a message for every token would cost more than the token."""
        texts = [self._pipeline.text_stream(job) for job in self._work.jobs]
        not_before = 0.0
        while not self._is_over:
            events, failure = await self._until(not_before)
            not_before = time.monotonic() + self._service.stream_interval_s
            for event in events:
                index = self._position[event.request_id]
                if isinstance(event, Finished):
                    pieces = texts[index].finish(cast("list[Hypothesis]", event.result))
                else:
                    pieces = texts[index].push(event)
                for sequence, text, told in pieces:
                    yield Delta(index, sequence, text, told)
            if failure:
                raise failure
        yield await self._put_into_words()

    def close(self) -> None:
        """Cancel what has not finished."""
        if self._unfinished:
            self._service.forget(list(self._unfinished))
            self._unfinished.clear()

    @property
    def _ends_at(self) -> float:
        return self._work.deadline + GRACE_S

    @property
    def _is_over(self) -> bool:
        return len(self._results) == len(self._work.jobs)

    async def _until(self, moment: float) -> tuple[list[Finished | Progress], Exception | None]:
        """What comes until then, in `time.monotonic` seconds: at least one event, progress of one output as one; and
        what a request failed with meanwhile, which ends the call after these."""
        events: dict[tuple[str, int | None], Finished | Progress] = {}
        try:
            while not self._is_over and (not events or time.monotonic() < moment or not self._events.empty()):
                async with asyncio.timeout(moment - time.monotonic() if events else None), ending_at(self._ends_at):
                    event = await self._next()
                key = (event.request_id, event.index if isinstance(event, Progress) else None)
                if isinstance(event, Progress) and isinstance(earlier := events.get(key), Progress):
                    event = earlier.then(event)
                events[key] = event
        except TimeoutError:
            pass
        except Exception as failure:
            return list(events.values()), failure
        return list(events.values()), None

    async def _next(self) -> Finished | Progress:
        """The next event. Raises what a request failed with."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            self._results[self._position[event.request_id]] = event.result
        return event

    async def _put_into_words(self) -> Answer:
        """In a thread where it takes long enough to make others wait."""
        return await self._service.in_pool(self._answer) if self._is_long else self._answer()

    @property
    def _is_long(self) -> bool:
        return self._num_tokens + sum(map(self._pipeline.num_details, self._work.jobs)) // NUMBERS_PER_TOKEN > LONG

    @property
    def _num_tokens(self) -> int:
        count = self._pipeline.num_output_tokens
        return sum(count(job, self._results[index]) for index, job in enumerate(self._work.jobs))

    def _answer(self) -> Answer:
        work, pipeline = self._work, self._pipeline
        finished = [(job, self._results[index]) for index, job in enumerate(work.jobs)]
        return Answer(
            model=work.model.name,
            revision=pipeline.revision,
            results=[self._rendered(job, result) for job, result in finished],
            usage={
                "input_tokens": sum(job.num_input_tokens for job in work.jobs),
                "output_tokens": self._num_tokens,
            },
            is_long=self._is_long,
        )

    def _rendered(self, job: "Job", result: "list[Hypothesis] | Scores") -> dict[str, Any]:
        """As the pipeline renders it, with states as a client may hold them."""
        rendered = self._pipeline.render(job, result)
        for holder in (rendered, *rendered.get("sequences", ())):
            if "state" in holder:
                holder["state"] = self._service.seal.seal(holder["state"], job.width)
        if job.id in self._work.exact:
            rendered["state_exact"] = self._work.exact[job.id]
        return rendered
