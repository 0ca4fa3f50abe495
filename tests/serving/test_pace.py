"""The estimate by hand, and what it is for: a server to which ten times too much comes goes on answering in time."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from seqmodels.decoding.request import Times
from seqmodels.decoding.waiting import Bounds
from serving.pace import IN_TIME, LATE, LEAST_SHARE, MOST_CAUTION, Pace, Preparing, Turn

TURNS, TURN_S = 10, 0.05


def known(turn: Turn) -> Pace:
    """Of a model whose requests take 10 turns of 50 ms, as of now."""
    pace = Pace()
    answered(pace, TURNS, turn)
    pace.turned(TURN_S, turn, now=TURNS * TURN_S)
    return pace


def answered(pace: Pace, turns: int, turn: Turn) -> None:
    """A request is, in its last turn, which goes on."""
    begins = pace._ends[-1] if pace._ends else 0.0
    for number in range(1, turns):
        pace.turned(TURN_S, turn, now=begins + number * TURN_S)
    pace.finished(Times(admitted=begins + TURN_S / 2))


def busy(running: int, waiting: dict[tuple[int, str], list[float]] | None = None, room: float = 0.0) -> Turn:
    waiting = waiting or {}
    return Turn(running, running + sum(map(len, waiting.values())), waiting, room)


def test_nothing_is_known_and_nothing_runs() -> None:
    assert Pace().seconds(0, "", 9.0) == 0
    pace = Pace()
    pace.turned(TURN_S, busy(1, {(0, ""): [1.0] * 3}), now=1.0)
    assert pace.seconds(0, "", 9.0) == 0  # no request has been answered yet
    assert known(Turn()).seconds(0, "", 9.0, count=5) == 0
    assert known(Turn(3)).seconds(0, "", 9.0, count=5) == 0  # the last ones have just been answered


def test_without_a_queue_nobody_is_refused() -> None:
    """What is asked for may be far shorter than what others ask for."""
    assert known(busy(4)).seconds(0, "", 9.0) == 0


NEEDS_S = (TURNS + 1) * TURN_S  # of a long request, and of the turn that goes on
MEAN_S = TURNS * TURN_S


def test_a_queue_adds_a_share_for_each_who_goes_first() -> None:
    # 2 of 8 run, 6 wait: until one of those has its rows, three times what a request takes in the mean goes by.
    assert known(busy(2, {(0, ""): [1.0] * 6})).seconds(0, "", 9.0) == pytest.approx(NEEDS_S + MEAN_S * 6 / 2)


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
    pace = known(busy(10, {(0, "many"): [1.0] * 40, (0, "few"): [1.0] * 2, (1, "urgent"): [1.0] * 7}))
    assert pace.seconds(priority, client, 9.0) == pytest.approx(NEEDS_S + MEAN_S * ahead / 10)


def test_of_one_client_the_earlier_deadlines_go_first() -> None:
    pace = known(busy(2, {(0, ""): [3.0, 9.0, 60.0, 60.0]}))
    assert pace.seconds(0, "", 2.0) == 0
    assert pace.seconds(0, "", 10.0) == pytest.approx(NEEDS_S + MEAN_S * 2 / 2)
    assert pace.seconds(0, "", None) == pytest.approx(NEEDS_S + MEAN_S * 4 / 2)


def test_more_urgent_requests_wait_for_nobody() -> None:
    assert known(busy(4, {(0, ""): [1.0] * 40})).seconds(1, "new", 9.0) == 0


def test_a_list_waits_for_itself() -> None:
    assert known(busy(4)).seconds(0, "", 9.0, count=9) == pytest.approx(NEEDS_S + MEAN_S * 8 / 4)


def test_who_is_on_the_way_counts_beyond_the_room_that_is_left() -> None:
    pace = known(busy(4, room=6))
    for _ in range(8):
        pace.comes(0, "", 5.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(NEEDS_S + MEAN_S * 2 / 4)
    pace.came(0, "", 5.0)
    pace.came(0, "", 5.0)
    assert pace.seconds(0, "", 9.0) == 0


def test_who_has_come_during_a_forward_pass_goes_into_the_next_one() -> None:
    pace = Pace()
    for number, running in enumerate((8, 2)):  # so many were answered by it, and nobody is left
        pace.finished(Times(admitted=(number + 0.5) * TURN_S))
        pace.turned(TURN_S, Turn(running, is_pass=True), now=(number + 1) * TURN_S)
    assert pace.seconds(0, "", 9.0) == 0
    for _ in range(16):
        pace.comes(0, "", 5.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(TURN_S * (1 + 1 + 16 / 8))  # 8 have gone through one before


def test_there_must_be_time_for_nine_of_ten_requests_and_a_queue_moves_as_the_mean_does() -> None:
    pace, turn = Pace(), busy(2, {(0, ""): [1.0] * 4})
    for turns in range(1, 65):
        answered(pace, turns, turn)
    assert pace.bounds.needs_s == pytest.approx((58 + 1) * TURN_S)  # the 58th of 64
    assert pace.seconds(0, "", 9.0) == pytest.approx(TURN_S * (58 + 1 + 32.5 * 4 / 2))
    for _ in range(64):
        answered(pace, 3, turn)
    assert pace.bounds.needs_s == pytest.approx((3 + 1) * TURN_S)  # older ones no longer count


QUEUE = busy(4, {(0, ""): [1.0] * 4})
WITH_QUEUE = NEEDS_S + MEAN_S


def test_it_follows_the_machine() -> None:
    pace = known(QUEUE)
    for _ in range(30):
        pace.turned(3 * TURN_S, QUEUE, now=9.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(3 * WITH_QUEUE, rel=0.01)


def test_a_turn_that_stood_still_says_little_of_others() -> None:
    pace = known(QUEUE)
    pace.turned(100.0, QUEUE, now=100.5)
    assert pace.seconds(0, "", 9.0) == pytest.approx((1 + 0.2 * 3) * WITH_QUEUE)


def test_who_was_late_would_have_taken_more_turns() -> None:
    pace = known(QUEUE)
    pace.expired(Times(admitted=TURNS * TURN_S / 2), was_estimated=False, now=TURNS * TURN_S)
    assert pace.bounds.needs_s == pytest.approx((TURNS + 1) * TURN_S)  # of half the turns nothing is learned
    for number in range(1, 2 * TURNS + 1):
        pace.turned(TURN_S, QUEUE, now=(TURNS + number) * TURN_S)
    pace.expired(Times(admitted=TURN_S / 2), was_estimated=False, now=3 * TURNS * TURN_S)
    assert pace.bounds.needs_s == pytest.approx((3 * TURNS + 1 + 1) * TURN_S)


def test_more_care_where_an_estimate_was_wrong_but_once_a_turn() -> None:
    pace = known(QUEUE)
    for _ in range(8):
        pace.given_up(was_estimated=True)
        pace.expired(Times(), was_estimated=True, now=9.0)
    pace.turned(TURN_S, QUEUE, now=1.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(WITH_QUEUE * LATE)
    pace.finished(Times())
    assert pace.seconds(0, "", 9.0) == pytest.approx(WITH_QUEUE * LATE / IN_TIME)
    for _ in range(50):
        pace.given_up(was_estimated=True)
        pace.turned(TURN_S, QUEUE, now=1.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(WITH_QUEUE * MOST_CAUTION)
    for _ in range(500):
        pace.finished(Times())
    assert pace.seconds(0, "", 9.0) == pytest.approx(WITH_QUEUE)


def test_nobody_was_promised_anything_without_an_estimate() -> None:
    """As a list of requests that allow a tenth of a second, on a service that has nothing to do."""
    pace = known(QUEUE)
    for _ in range(8):
        pace.given_up(was_estimated=False)
        pace.expired(Times(), was_estimated=False, now=9.0)
        pace.turned(TURN_S, QUEUE, now=1.0)
    assert pace.seconds(0, "", 9.0) == pytest.approx(WITH_QUEUE)


def test_what_is_prepared_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("serving.pace.time.monotonic", lambda: clock[0])
    preparing = Preparing()
    calls = [preparing.one() for _ in range(4)]
    for call in calls[:3]:
        call.__enter__()
    assert preparing.seconds == 0  # nothing is known yet
    for call, moment in zip(calls[:3], (0.3, 0.4, 0.5), strict=True):  # one was slow, then they ended in turn
        clock[0] = moment
        call.__exit__(None, None, None)
    assert preparing.seconds == 0  # nobody else is at it
    clock[0] = 9.0
    with preparing.one(), preparing.one(), preparing.one():
        assert preparing.seconds == pytest.approx(3 * (0.3 + 0.1 + 0.1) / 3)
        clock[0] = 9.1
    assert preparing.seconds == 0


def test_before_a_model_that_nobody_waits_for_only_preparing_counts() -> None:
    assert known(busy(4)).seconds(0, "", 9.0, preparing_s=0.3) == pytest.approx(0.3)
    assert known(Turn(4)).seconds(0, "", 9.0, preparing_s=0.3) == pytest.approx(0.3)
    assert known(QUEUE).seconds(0, "", 9.0, preparing_s=0.3) == pytest.approx(0.3 + WITH_QUEUE)


def slowed(step_s: float = 4 * TURN_S, is_pass: bool = False) -> Pace:
    """`known`, and now a turn takes four times as long: many run. One that has had rows for long enough is late."""
    pace = Pace()
    for number in range(TURNS):
        pace.turned(TURN_S, replace(QUEUE, step_s=TURN_S), now=number * TURN_S)
    pace.finished(Times(admitted=TURN_S / 2))
    for _ in range(50):
        pace.turned(4 * TURN_S, replace(QUEUE, step_s=step_s, is_pass=is_pass), now=9.0)
    return pace


ENOUGH_S = 1.1 * MEAN_S  # for a request that runs alone


def test_the_share_shrinks_once_a_turn_and_grows_with_who_was_in_time() -> None:
    pace = slowed()
    assert pace.bounds.share == 1
    for _ in range(3):
        pace.expired(Times(admitted=9.0), was_estimated=False, now=9.0 + ENOUGH_S)
    assert pace.bounds.share == 1  # until the turn is over
    pace.turned(4 * TURN_S, QUEUE, now=9.8)
    pace.turned(4 * TURN_S, QUEUE, now=10.0)
    assert pace.bounds.share == pytest.approx(1 / LATE)
    pace.finished(Times())
    assert pace.bounds.share == pytest.approx(IN_TIME / LATE)
    pace.turned(None, Turn(), now=11.0)
    assert pace.bounds.share == 1  # nothing is to do


def test_the_share_has_an_end() -> None:
    pace = slowed()
    for _ in range(99):
        pace.expired(Times(admitted=10.0), was_estimated=False, now=10.0 + ENOUGH_S)
        pace.turned(4 * TURN_S, replace(QUEUE, step_s=4 * TURN_S), now=10.0)
    assert pace.bounds.share == LEAST_SHARE


@pytest.mark.parametrize(
    ("pace", "times", "now"),
    [
        (slowed(), Times(submitted=0.0), 20.0),  # had no rows
        (slowed(), Times(admitted=9.0), 9.0 + 0.9 * MEAN_S),  # too late for it alone, too
        (slowed(step_s=TURN_S), Times(admitted=9.0), 29.0),  # it is another model that takes its time
        (slowed(is_pass=True), Times(admitted=9.0), 29.0),  # smaller passes would take longer in all
        (known(QUEUE), Times(admitted=9.0), 9.0 + ENOUGH_S),  # turns are as short as can be: it took many
    ],
)
def test_who_fewer_would_not_have_let_be_in_time_is_no_sign_of_too_many(pace: Pace, times: Times, now: float) -> None:
    pace.expired(times, was_estimated=False, now=now)
    pace.turned(TURN_S, QUEUE, now=30.0)
    assert pace.bounds.share == 1


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
            self._tell(num_running, now)
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
        kept = [arrival for arrival in self.waiting if arrival + 1 > now + bounds.needs_s]
        for _ in range(len(self.waiting) - len(kept)):
            self.pace.given_up(was_estimated=True)
        self.waiting = kept

    def _turn(self, now: float) -> int:
        left, answered = [], 0
        for arrival, times, turns in self.running:
            if turns > 1 or now > arrival + 1:
                left.append((arrival, times, turns - 1))
                continue
            self.pace.finished(times)
            answered += 1
        self.running = left
        return answered

    def _tell(self, num_running: int, now: float) -> None:
        share = self.pace.bounds.share if self.is_bounded else 1.0
        waiting = {(0, ""): [arrival + 1 for arrival in self.waiting]}
        room = max(0.0, share * self.rows - num_running)
        left = len(self.running) + len(self.waiting)
        step_s = self.turn_s(num_running)
        turn = Turn(num_running, left, waiting, room, step_s=step_s) if num_running else Turn()
        self.pace.turned(step_s, turn, now)


def test_ten_times_too_much_is_answered_in_time_as_far_as_it_can_be() -> None:
    can = 20 / (TURNS * TURN_S)
    assert Server().answered_in_time() > 0.98 * can
    assert Server(refuses=False, is_bounded=False).answered_in_time() < 0.6 * can  # what the estimate is for


def test_where_many_at_a_time_are_too_slow_fewer_are_taken() -> None:
    """60 at a time would take 3 s each. 17 take 0.95 s, and the server can answer 17.9 a second in time at best."""
    slow = {"rows": 60, "turn_s": lambda running: 0.01 + 0.005 * running}
    assert Server(**slow).answered_in_time() > 0.75 * 17.9
    assert Server(**slow, is_bounded=False).answered_in_time() < 0.2 * 17.9  # what the share is for
