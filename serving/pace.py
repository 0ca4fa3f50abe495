"""Pace: how long a new request to a model would take, so that one that cannot be answered in time is refused at once.

A queue in the order of deadlines fails as a whole when more comes than can be done: each request gets its turn when its
time is almost over, and nothing is ever ready in time. What is refused when it comes costs nothing, and its client can
ask elsewhere.

An estimate from what has just happened: the turns that requests take once they have their rows, which do not depend on
how many others run; the seconds that a turn takes now; how many run, and how many would go first. Knows no tensors.
"""

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from seqmodels.decoding.request import Times

OF_TURNS, OF_SECONDS = 0.1, 0.2  # how much the newest counts
# An estimate is multiplied by a factor, for one that is right in the mean would be too short for half of all requests.
# The factor grows with each request that was let in and was not ready in time, and shrinks with each that was, so that
# in the long run at most one in ten is late.
CAUTION, MOST_CAUTION = 1.25, 2.0
GROWS, SHRINKS = 1.1, 0.99

Waiting = Mapping[tuple[int, str], int]  # requests without rows, by priority and client


@dataclass(frozen=True)
class Turn:
    """How many requests had rows in it, 0 where none is left; who still waits; how many more would have had rows."""

    running: int = 0
    waiting: Waiting = field(default_factory=dict)
    room: float = 0.0


class Pace:
    """Of one model. `turned` and `finished` belong to the runner's thread; the rest may be called by any."""

    def __init__(self) -> None:
        self._turns = 0.0  # of a request; 0 where none has been answered
        self._turn_s = 0.0
        self._caution = CAUTION
        self._now = Turn()
        self._coming: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()

    def comes(self, priority: int, client: str) -> None:
        """Note a request that was accepted, and is on its way to the model."""
        with self._lock:
            self._coming[priority, client] += 1

    def came(self, priority: int, client: str) -> None:
        """Note that it has arrived there."""
        with self._lock:
            self._coming[priority, client] -= 1

    def turned(self, seconds: float | None, turn: Turn) -> None:
        """Note a turn; seconds: None where there was nothing to do in it."""
        if seconds is not None:
            self._turn_s = _mixed(self._turn_s, seconds, OF_SECONDS)
        self._now = turn

    def finished(self, times: Times, was_estimated: bool) -> None:
        """Note a request that was answered. was_estimated: whether it was let in by an estimate that was not 0."""
        if times.admitted is not None and times.finished is not None and self._turn_s:
            turns = max(1.0, (times.finished - times.admitted) / self._turn_s)
            self._turns = _mixed(self._turns, turns, OF_TURNS)
        if was_estimated:
            self._caution = max(CAUTION, self._caution * SHRINKS)

    def expired(self, times: Times, was_estimated: bool, now: float) -> None:
        """Note a request whose deadline has passed. It would have taken longer than until now."""
        if times.admitted is not None and self._turn_s:
            turns = (now - times.admitted) / self._turn_s
            self._turns = max(self._turns, _mixed(self._turns, turns, OF_TURNS))
        if was_estimated:
            self._caution = min(MOST_CAUTION, self._caution * GROWS)

    def seconds(self, priority: int, client: str) -> float:
        """What a new request would take, with caution; 0 where nothing runs or nothing is known."""
        turn = self._now
        if not turn.running:
            return 0.0
        with self._lock:
            queue = self._coming + Counter(turn.waiting)
        ahead = max(0.0, _ahead(queue, priority, client) - turn.room)
        return self._caution * self._turns * self._turn_s * (1 + ahead / turn.running)


def _ahead(waiting: Waiting, priority: int, client: str) -> int:
    """How many go before a new request, as `decoding/waiting.py` orders them: all of a higher priority; of its own, the
    client's earlier ones, and of each other client as many, for they take turns."""
    own = waiting.get((priority, client), 0)
    ahead = 0
    for (other_priority, _), count in waiting.items():
        if other_priority > priority:
            ahead += count
        elif other_priority == priority:
            ahead += min(count, own)
    return ahead


def _mixed(old: float, new: float, share: float) -> float:
    return new if not old else old + share * (new - old)


def wait_s(seconds: float, allowed: float) -> int:
    """Whole seconds after which to try again, at least 1."""
    return max(1, math.ceil(seconds - allowed))
