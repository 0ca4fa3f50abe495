"""The estimate by hand, and what it is for: a server to which ten times too much comes goes on answering in time."""

import heapq
import random
from collections.abc import Callable

import pytest

from seqmodels.decoding.request import Times
from serving.pace import CAUTION, Pace, Turn, try_again_s

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


def in_time(refuses: Callable[[Pace, float, float], bool]) -> float:
    """The share of what a server can do that it does in time while ten times as much comes, for a minute.

    20 requests have rows at a time and take 10 turns of 50 ms, so 40 can be answered a second; each is of use for 1 s,
    and who has waited for its turn the longest goes first.
    """
    drawn, pace, now, next_arrival = random.Random(0), Pace(), 0.0, 0.0
    waiting: list[float] = []  # arrivals
    running: list[tuple[float, Times, int]] = []  # arrival, times, turns left
    answered, coming = 0, list[float]()
    while now < 60:
        while next_arrival <= now:
            if not refuses(pace, next_arrival + 1.0, now):
                heapq.heappush(waiting, next_arrival)
                pace.comes(0, "", next_arrival + 1.0)
                coming.append(next_arrival + 1.0)
            next_arrival += drawn.expovariate(400)
        waiting = [arrival for arrival in waiting if arrival + 1.0 > now]
        for arrival, times, _ in running:
            if arrival + 1.0 <= now:
                pace.expired(times, was_estimated=True, now=now)
        running = [one for one in running if one[0] + 1.0 > now]
        while waiting and len(running) < 20:
            running.append((heapq.heappop(waiting), Times(admitted=now), TURNS + drawn.randint(-2, 2)))
        num_running, room = len(running), 20 - len(running)
        for deadline in coming:
            pace.came(0, "", deadline)
        coming.clear()
        now += TURN_S
        left = []
        for arrival, times, turns in running:
            if turns > 1:
                left.append((arrival, times, turns - 1))
                continue
            times.finished = now
            pace.finished(times, was_estimated=True)
            answered += now <= arrival + 1.0
        running = left
        pace.turned(
            TURN_S,
            Turn(num_running, {(0, ""): [arrival + 1.0 for arrival in waiting]}, room)
            if waiting or running
            else Turn(),
        )
    return answered / (40 * 60)


def test_ten_times_too_much_is_answered_in_time_as_far_as_it_can_be() -> None:
    assert in_time(lambda pace, deadline, now: pace.seconds(0, "", deadline) > deadline - now) > 0.95
    assert in_time(lambda pace, deadline, now: False) < 0.6  # what the estimate is for
