"""The estimate by hand, and what it is for: a server to which ten times too much comes goes on answering in time."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from seqmodels.decoding.request import Times
from seqmodels.decoding.waiting import Bounds
from serving.pace import CAUTION, LEAST_SHARE, Pace, Turn, try_again_s

TURNS, TURN_S = 10, 0.05


def known(turn: Turn) -> Pace:
    """Of a model whose requests take 10 turns of 50 ms, as of now."""
    pace = Pace()
    pace.turned(TURN_S, turn)
    pace.finished(Times(submitted=0.0, admitted=1.0, finished=1.0 + TURNS * TURN_S), was_estimated=False)
    return pace


def test_nothing_is_known_and_nothing_runs() -> None:
    assert Pace().seconds(0, "", 9.0) == 0
    pace = Pace()
    pace.turned(TURN_S, Turn(1, {(0, ""): [1.0] * 3}))
    assert pace.seconds(0, "", 9.0) == 0  # no request has been answered yet
    assert known(Turn()).seconds(0, "", 9.0) == 0  # the last one has just been answered


def test_without_a_queue_nobody_is_refused() -> None:
    """What is asked for may be far shorter than what others ask for."""
    assert known(Turn(4)).seconds(0, "", 9.0) == 0


def test_a_queue_adds_a_share_for_each_who_goes_first() -> None:
    # 2 of 8 run, 6 wait: those wait for three times what a request takes.
    assert known(Turn(2, {(0, ""): [1.0] * 6})).seconds(0, "", 9.0) == pytest.approx(
        CAUTION * TURNS * TURN_S * (1 + 6 / 2)
    )


@pytest.mark.parametrize(
    ("priority", "client", "ahead"),
    [
        (0, "many", 40 + 2 + 7),  # its own, those of another client, the urgent ones
        (0, "few", 2 + 2 + 7),  # clients take turns
        (0, "new", 0 + 0 + 7),
        (-1, "new", 40 + 2 + 7),
    ],
)
def test_only_those_count_who_go_first(priority: int, client: str, ahead: int) -> None:
    pace = known(Turn(10, {(0, "many"): [1.0] * 40, (0, "few"): [1.0] * 2, (1, "urgent"): [1.0] * 7}))
    assert pace.seconds(priority, client, 9.0) == pytest.approx(CAUTION * TURNS * TURN_S * (1 + ahead / 10))


def test_of_one_client_the_earlier_deadlines_go_first() -> None:
    pace = known(Turn(2, {(0, ""): [3.0, 9.0, 60.0, 60.0]}))
    assert pace.seconds(0, "", 2.0) == 0
    assert pace.seconds(0, "", 10.0) == pytest.approx(CAUTION * TURNS * TURN_S * (1 + 2 / 2))
    assert pace.seconds(0, "", None) == pytest.approx(CAUTION * TURNS * TURN_S * (1 + 4 / 2))


def test_more_urgent_requests_wait_for_nobody() -> None:
    assert known(Turn(4, {(0, ""): [1.0] * 40})).seconds(1, "new", 9.0) == 0


def test_a_list_waits_for_itself() -> None:
    assert known(Turn(4)).seconds(0, "", 9.0, count=9) == pytest.approx(CAUTION * TURNS * TURN_S * (1 + 8 / 4))


def test_who_is_on_the_way_counts_beyond_the_room_that_is_left() -> None:
    pace = known(Turn(4, room=6))
    for _ in range(8):
        pace.comes(0, "", 5.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * TURNS * TURN_S * (1 + 2 / 4))
    pace.came(0, "", 5.0)
    pace.came(0, "", 5.0)
    assert pace.seconds(0, "", 9.0) == 0


QUEUE = Turn(4, {(0, ""): [1.0] * 4})
WITH_QUEUE = TURNS * TURN_S * 2


def test_it_follows_the_machine() -> None:
    pace = known(QUEUE)
    for _ in range(30):
        pace.turned(3 * TURN_S, QUEUE)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * 3 * WITH_QUEUE, rel=0.01)


def test_a_turn_that_stood_still_says_little_of_others() -> None:
    pace = known(QUEUE)
    pace.turned(100.0, QUEUE)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * (1 + 0.2 * 3) * WITH_QUEUE)


def test_caution_grows_with_who_was_late_and_shrinks_with_who_was_not() -> None:
    pace, times = known(QUEUE), Times(submitted=0.0, admitted=1.0, finished=1.0 + TURNS * TURN_S)
    pace.expired(Times(submitted=0.0, admitted=1.0), was_estimated=True, now=1.1)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * 1.1 * WITH_QUEUE)
    pace.finished(times, was_estimated=True)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * 1.1 * 0.99 * WITH_QUEUE)
    for _ in range(100):
        pace.finished(times, was_estimated=True)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * WITH_QUEUE)
    pace.expired(Times(submitted=0.0, admitted=1.0), was_estimated=False, now=1.1)  # nobody had promised anything
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * WITH_QUEUE)


def test_who_was_late_would_have_taken_more_turns() -> None:
    pace = known(QUEUE)
    pace.expired(Times(submitted=0.0, admitted=1.0), was_estimated=False, now=1.0 + 3 * TURNS * TURN_S)
    assert pace.seconds(0, "", 9.0) == pytest.approx(CAUTION * 1.2 * WITH_QUEUE)  # a tenth of the way from 10 to 30


def test_when_to_try_again() -> None:
    assert [try_again_s(seconds, 1.0) for seconds in (1.2, 2.0, 5.5)] == [1, 1, 5]


def test_the_share_shrinks_once_a_turn_and_grows_with_who_was_in_time() -> None:
    pace, times = known(QUEUE), Times(submitted=0.0, admitted=1.0, finished=1.0 + TURNS * TURN_S)
    assert pace.bounds.share == 1
    for _ in range(3):
        pace.expired(times, was_estimated=False, now=2.0)
    assert pace.bounds.share == 1  # until the turn is over
    pace.turned(TURN_S, QUEUE)
    pace.turned(TURN_S, QUEUE)
    assert pace.bounds.share == pytest.approx(1 / 1.1)
    pace.finished(times, was_estimated=False)
    assert pace.bounds.share == pytest.approx(1 / 1.1 / 0.99)
    pace.expired(Times(submitted=0.0), was_estimated=False, now=2.0)  # had no rows, so that it is no sign of too many
    pace.turned(TURN_S, Turn(4))
    pace.expired(times, was_estimated=False, now=2.0)  # nobody waits: it would have been late alone, too
    pace.turned(TURN_S, QUEUE)
    assert pace.bounds.share == pytest.approx(1 / 1.1 / 0.99)
    for _ in range(99):
        pace.expired(times, was_estimated=False, now=2.0)
        pace.turned(TURN_S, QUEUE)
    assert pace.bounds.share == LEAST_SHARE


@dataclass
class Server:
    """One on paper to which 400 requests a second come for a minute; each takes about 10 turns, and is of use for 1 s.

    Who has waited for its turn the longest goes first. turn_s: how long a turn takes in which so many run.
    """

    rows: int = 20
    turn_s: Callable[[int], float] = lambda running: TURN_S
    refuses: bool = True  # who could not be answered in time
    is_bounded: bool = True
    pace: Pace = field(default_factory=Pace)
    waiting: list[float] = field(default_factory=list)  # arrivals
    running: list[tuple[float, Times, int]] = field(default_factory=list)  # arrival, times, turns left

    def answered_in_time(self) -> float:
        """Requests a second."""
        drawn, now, next_arrival, answered = random.Random(0), 0.0, 0.0, 0
        while now < 60:
            coming = []
            while next_arrival <= now:
                if not (self.refuses and self.pace.seconds(0, "", next_arrival + 1) > next_arrival + 1 - now):
                    heapq.heappush(self.waiting, next_arrival)
                    self.pace.comes(0, "", next_arrival + 1)
                    coming.append(next_arrival + 1)
                next_arrival += drawn.expovariate(400)
            for deadline in coming:
                self.pace.came(0, "", deadline)
            self._expire(now)
            self._begin(now, drawn)
            num_running = len(self.running)
            now += self.turn_s(num_running)
            answered += self._turn(now)
            self._tell(num_running)
        return answered / 60

    def _expire(self, now: float) -> None:
        self.waiting = [arrival for arrival in self.waiting if arrival + 1 > now]
        for arrival, times, _ in self.running:
            if arrival + 1 <= now:
                self.pace.expired(times, was_estimated=True, now=now)
        self.running = [one for one in self.running if one[0] + 1 > now]

    def _begin(self, now: float, drawn: random.Random) -> None:
        bounds = self.pace.bounds if self.is_bounded else Bounds()
        while self.waiting and len(self.running) < max(1, int(bounds.share * self.rows)):
            turns = TURNS + drawn.randint(-2, 2)
            self.running.append((heapq.heappop(self.waiting), Times(admitted=now), turns))
        self.waiting = [arrival for arrival in self.waiting if arrival + 1 > now + bounds.needs_s]

    def _turn(self, now: float) -> int:
        left, answered = [], 0
        for arrival, times, turns in self.running:
            if turns > 1 or now > arrival + 1:
                left.append((arrival, times, turns - 1))
                continue
            times.finished = now
            self.pace.finished(times, was_estimated=True)
            answered += 1
        self.running = left
        return answered

    def _tell(self, num_running: int) -> None:
        share = self.pace.bounds.share if self.is_bounded else 1.0
        waiting = {(0, ""): [arrival + 1 for arrival in self.waiting]}
        room = share * self.rows - num_running
        self.pace.turned(self.turn_s(num_running), Turn(num_running, waiting, room) if num_running else Turn())


@pytest.mark.parametrize("is_bounded", [False, True])
def test_ten_times_too_much_is_answered_in_time_as_far_as_it_can_be(is_bounded: bool) -> None:
    can = 20 / (TURNS * TURN_S)
    assert Server(is_bounded=is_bounded).answered_in_time() > 0.95 * can
    assert Server(refuses=False, is_bounded=False).answered_in_time() < 0.6 * can  # what the estimate is for


def test_where_many_at_a_time_are_too_slow_fewer_are_taken() -> None:
    """60 at a time would take 3 s each. 17 take 0.95 s, and the server can answer 17.9 a second in time at best."""
    slow = {"rows": 60, "turn_s": lambda running: 0.01 + 0.005 * running}
    assert Server(**slow).answered_in_time() > 0.75 * 17.9
    assert Server(**slow, is_bounded=False).answered_in_time() < 0.2 * 17.9  # what the share is for
