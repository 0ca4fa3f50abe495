"""Pace: how long a new request to a model would take, so that one that cannot be answered in time is refused at once.

A queue in the order of deadlines fails as a whole when more comes than can be done: each request gets its turn when its
time is almost over, and nothing is ever ready in time. What is refused when it comes costs nothing, and its client can
ask elsewhere.

An estimate from what has just happened: the turns that requests take once they have their rows, which do not depend on
how many others run; the seconds that a turn takes now; how many run, and how many would go first. Knows no tensors.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from seqmodels.decoding.request import Times
from seqmodels.decoding.waiting import Bounds

OF_TURNS, OF_SECONDS = 0.1, 0.2  # how much the newest counts
MOST_LONGER = 4.0  # than the mean of turns, that one counts
# An estimate is multiplied by a factor, for one that is right in the mean would be too short for half of all requests.
# The factor grows with each request that was let in and was not ready in time, and shrinks with each that was, so that
# in the long run at most one in ten is late. The share of the rows that may be in use goes the other way, for fewer
# requests at a time end sooner.
CAUTION, MOST_CAUTION = 1.25, 2.0
LEAST_SHARE = 1 / 32
GROWS, SHRINKS = 1.1, 0.99

Key = tuple[int, str]  # a priority and a client
Waiting = Mapping[Key, list[float]]  # the deadlines of requests without rows


@dataclass(frozen=True)
class Turn:
    """How many requests had rows in it, 0 where none is left; who still waits; how many more would have had rows."""

    running: int = 0
    waiting: Waiting = field(default_factory=dict)
    room: float = 0.0


class Pace:
    """Of one model. `comes`, `seconds` and `share` may be used by any thread; the rest belongs to the runner's."""

    def __init__(self) -> None:
        self._turns = 0.0  # of a request; 0 where none has been answered
        self._turn_s = 0.0
        self._caution = CAUTION
        self.share = 1.0  # of the rows, that may be in use
        self._was_late = False  # in this turn, somebody who had rows, while others waited for some
        self._now = Turn()
        self._coming: defaultdict[Key, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def comes(self, priority: int, client: str, deadline: float | None) -> None:
        """Note a request that was accepted, and is on its way to the model."""
        with self._lock:
            self._coming[priority, client].append(_moment(deadline))

    def came(self, priority: int, client: str, deadline: float | None) -> None:
        """Note that it has arrived there."""
        with self._lock:
            coming = self._coming[priority, client]
            coming.remove(_moment(deadline))
            if not coming:
                del self._coming[priority, client]

    def turned(self, seconds: float | None, turn: Turn) -> None:
        """Note a turn; seconds: None where there was nothing to do in it."""
        if self._was_late:
            self.share = max(LEAST_SHARE, self.share / GROWS)
        self._was_late = False
        if seconds is not None:
            most = MOST_LONGER * self._turn_s if self._turn_s else seconds  # one that stood still says little of others
            self._turn_s = _mixed(self._turn_s, min(seconds, most), OF_SECONDS)
        self._now = turn

    def finished(self, times: Times, was_estimated: bool) -> None:
        """Note a request that was answered in time. was_estimated: whether it was let in by an estimate that was not
        0."""
        self.share = min(1.0, self.share / SHRINKS)
        if times.admitted is not None and times.finished is not None and self._turn_s:
            turns = max(1.0, (times.finished - times.admitted) / self._turn_s)
            self._turns = _mixed(self._turns, turns, OF_TURNS)
        if was_estimated:
            self._caution = max(CAUTION, self._caution * SHRINKS)

    def expired(self, times: Times, was_estimated: bool, now: float) -> None:
        """Note a request whose deadline has passed. It would have taken longer than until now."""
        self._was_late |= times.admitted is not None and bool(self._now.waiting)
        if times.admitted is not None and self._turn_s:
            turns = (now - times.admitted) / self._turn_s
            self._turns = max(self._turns, _mixed(self._turns, turns, OF_TURNS))
        if was_estimated:
            self._caution = min(MOST_CAUTION, self._caution * GROWS)

    @property
    def bounds(self) -> Bounds:
        """Within which requests should begin now."""
        return Bounds(self.share, self._needs_s)

    @property
    def _needs_s(self) -> float:
        """What a request takes from when it has its rows, with caution; 0 where nothing is known."""
        return self._caution * self._turns * self._turn_s

    def seconds(self, priority: int, client: str, deadline: float | None, count: int = 1) -> float:
        """What so many new requests would take, with caution; 0 where nobody would go before them, or nothing is known:
        then a short one may be ready long before others are."""
        turn = self._now
        if not turn.running:
            return 0.0
        with self._lock:
            ahead = sum(_ahead(queue, priority, client, _moment(deadline)) for queue in (turn.waiting, self._coming))
        beyond = ahead + count - 1 - turn.room
        if beyond <= 0:
            return 0.0
        return self._needs_s * (1 + beyond / turn.running)


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


def try_again_s(seconds: float, allowed: float) -> int:
    """Whole seconds after which to try again, at least 1."""
    return max(1, math.ceil(seconds - allowed))
