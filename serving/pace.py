"""Pace: how long a new request to a model would take, so that one that cannot be answered in time is refused at once.

A queue in the order of deadlines fails as a whole when more comes than can be done: each request gets its turn when its
time is almost over, and nothing is ever ready in time. What is refused when it comes costs nothing, and its client can
ask elsewhere.

An estimate from what has just happened: the turns that requests take once they have their rows, which do not depend on
how many others run; the seconds that a turn takes now; how many run, and how many would go first. Knows no tensors.
"""

import math
import threading
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from seqmodels.decoding.request import Times
from seqmodels.decoding.waiting import Bounds

OF_SECONDS = 0.2  # how much the newest turn counts
MOST_LONGER = 4.0  # than the mean of turns, that one counts
LAST = 64  # requests, of which an estimate is made
LAST_TURNS = 4096  # whose ends are kept, to count those of a request
LONG = 0.9  # of these take at most what a request must have time for
# Two numbers follow what becomes of requests, so that about one in fifty is late: the share of the rows that may be in
# use, for fewer requests at a time end sooner, and the caution that an estimate is multiplied by. Both change by LATE
# with a turn in which one was late, and go back by IN_TIME with each that was not, and by LATE where nothing is to do.
LATE, IN_TIME = 1.1, 1.002
LEAST_SHARE, MOST_CAUTION = 1 / 32, 2.0
SLOWED = 2.0  # a step takes more than so many times the least where too many are in it

Key = tuple[int, str]  # a priority and a client
Waiting = Mapping[Key, list[float]]  # the deadlines of requests without rows


@dataclass(frozen=True)
class Turn:
    """How many requests had rows in it; how many are left, with those that wait; who waits; how many more would have
    had rows. is_pass: whether it was a forward pass, which takes all who have come, and takes longer for it. step_s:
    what the model's own step took."""

    running: int = 0
    left: int = 0
    waiting: Waiting = field(default_factory=dict)
    room: float = 0.0
    is_pass: bool = False
    step_s: float = 0.0


class Recent:
    """The mean of the last so many values, what most of them do not exceed, and the largest; 0 where there is none."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=LAST)
        self.mean = self.long = self.largest = 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        ordered = sorted(self._values)
        self.mean, self.largest = sum(ordered) / len(ordered), ordered[-1]
        self.long = ordered[int(LONG * len(ordered))]


class Preparing:
    """How long calls take from when their bodies have come until they are prepared, for all models together. Of the
    event loop alone."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._last_end = 0.0
        self._gaps = Recent()  # seconds from the end of one to that of the next, where it had begun by then

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around the preparation of one call."""
        self._num_calls += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._num_calls -= 1
            now = time.monotonic()
            self._gaps.add(now - max(began, self._last_end))
            self._last_end = now

    @property
    def seconds(self) -> float:
        """Until those are prepared that are at it now."""
        return self._num_calls * self._gaps.mean


class Pace:
    """Of one model. `comes`, `came`, `seconds` and `share` may be used by any thread, the rest by the runner's."""

    def __init__(self) -> None:
        self._turns = Recent()  # that requests took
        self._passes = Recent()  # how many requests went through each
        self._ends: deque[float] = deque(maxlen=LAST_TURNS)  # of turns, in `time.monotonic` seconds
        self._turn_s = self._step_s = 0.0
        self._least_step_s = math.inf  # so far: about what a step takes in which hardly anybody runs
        self.share = 1.0  # of the rows, that may be in use
        self._caution = 1.0
        self._was_slow = False  # in this turn, one who would have been in time if fewer had run was late ...
        self._was_wrong = False  # ... or one who was let in by an estimate
        self._now = Turn()
        self._coming: defaultdict[Key, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def comes(self, priority: int, client: str, deadline: float | None) -> None:
        """Note a request that was accepted, and is on its way to the model."""
        with self._lock:
            self._coming[priority, client].append(_moment(deadline))

    def came(self, priority: int, client: str, deadline: float | None) -> None:
        """Note that it has arrived there, or never will."""
        with self._lock:
            coming = self._coming[priority, client]
            coming.remove(_moment(deadline))
            if not coming:
                del self._coming[priority, client]

    def turned(self, seconds: float | None, turn: Turn, now: float) -> None:
        """Note a turn that has just ended; seconds: None where there was nothing to do in it."""
        if seconds is None:
            self._eases(LATE)
            self._now = turn
            return
        if self._was_slow:
            self.share = max(LEAST_SHARE, self.share / LATE)
        if self._was_wrong:
            self._caution = min(MOST_CAUTION, self._caution * LATE)
        self._was_slow = self._was_wrong = False
        most = MOST_LONGER * self._turn_s if self._turn_s else seconds  # one that stood still says little of others
        self._turn_s = _mixed(self._turn_s, min(seconds, most), OF_SECONDS)
        self._step_s = _mixed(self._step_s, min(turn.step_s, most), OF_SECONDS)
        self._least_step_s = min(self._least_step_s, self._step_s)
        if turn.is_pass:
            self._passes.add(turn.running)
        self._ends.append(now)
        self._now = turn

    def finished(self, times: Times) -> None:
        """Note a request that was answered in time."""
        self._eases(IN_TIME)
        if times.admitted is not None:
            self._turns.add(self._turns_since(times.admitted))

    def expired(self, times: Times, was_estimated: bool, now: float) -> None:
        """Note a request whose deadline has passed. It would have taken longer than until now. was_estimated: whether
        it was let in by an estimate that was not 0."""
        self._was_wrong |= was_estimated
        if times.admitted is not None and self._turn_s:
            slowed = self._step_s > SLOWED * self._least_step_s and not self._now.is_pass
            alone_s = self._turns.long * (self._turn_s - self._step_s + self._least_step_s)
            self._was_slow |= slowed and now - times.admitted >= alone_s
            if (turns := self._turns_since(times.admitted)) > self._turns.mean:
                self._turns.add(turns)

    def given_up(self, was_estimated: bool) -> None:
        """Note a request that was let in and has waited in vain: all that was done for it was done for nothing."""
        self._was_wrong |= was_estimated

    def _eases(self, factor: float) -> None:
        self.share = min(1.0, self.share * factor)
        self._caution = max(1.0, self._caution / factor)

    def _turns_since(self, admitted: float) -> int:
        """With the one that goes on."""
        return len(self._ends) - bisect_right(self._ends, admitted) + 1

    @property
    def bounds(self) -> Bounds:
        """Within which requests should begin now."""
        return Bounds(self.share, self._needs_s, self._turn_s)

    @property
    def _needs_s(self) -> float:
        """What a long request takes, from when the turn has ended that goes on; 0 where nothing is known."""
        return (self._turns.long + 1) * self._turn_s if self._turns.long else 0.0

    def seconds(
        self, priority: int, client: str, deadline: float | None, count: int = 1, preparing_s: float = 0.0
    ) -> float:
        """What so many new requests would take, if they are long ones. Where nobody would go before them at the model,
        or nothing is known, only preparing_s, until they come there: a short one may be ready long before others are.
        """
        turn = self._now
        with self._lock:
            ahead = sum(_ahead(queue, priority, client, _moment(deadline)) for queue in (turn.waiting, self._coming))
            is_idle = not turn.running or not (turn.left or self._coming)
        beyond = max(0.0, ahead + count - 1 - turn.room)
        if is_idle or not beyond:
            return self._caution * preparing_s
        at_a_time = self._passes.largest if turn.is_pass else turn.running
        queue_s = self._turns.mean * self._turn_s * beyond / at_a_time
        return self._caution * (preparing_s + queue_s + self._needs_s)


def _ahead(waiting: Waiting, priority: int, client: str, deadline: float) -> int:
    """How many go before a new request, about as `decoding/waiting.py` orders them: all of a higher priority; of its
    own, the client's with an earlier deadline, and of each other client as many, for they take turns."""
    own = sum(other <= deadline for other in waiting.get((priority, client), ()))
    ahead = 0
    for (other_priority, _), deadlines in waiting.items():
        if other_priority > priority:
            ahead += len(deadlines)
        elif other_priority == priority:
            ahead += min(len(deadlines), own)
    return ahead


def _moment(deadline: float | None) -> float:
    return math.inf if deadline is None else deadline


def _mixed(old: float, new: float, share: float) -> float:
    return new if not old else old + share * (new - old)
