"""The policies do what they say, and a knee stands where p99 crosses the bound."""

from collections import deque

import pytest
import torch

from benchmarks.continuous import Point, Policy, Workload, continuous, gaps, knee, next_batch, padded, serve, shrinking
from benchmarks.workload import make_requests, of_length
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from tests.seqmodels.builders import make_translator

STEPS = {"0": 2, "1": 8, "2": 4}


@pytest.fixture
def requests() -> list[Request]:
    plain = make_requests([torch.tensor([5, 6, 3])] * 3, SearchParams(num_beams=2))
    return [of_length(request, STEPS[request.id]) for request in plain]


def num_steps(policy: Policy, requests: list[Request]) -> int:
    """Of an engine with room for two requests at a time."""
    engine, waiting, steps = Engine(make_translator(), max_rows=4), deque(requests), 0
    while waiting or engine.has_work:
        policy(waiting, engine)
        engine.step()
        steps += 1
    return steps


def test_steps_of_each_policy(requests: list[Request]) -> None:
    """Requests of 2, 8 and 4 steps: the third joins after 2, or after the 8 of the first batch."""
    assert num_steps(continuous, requests) == 8
    assert num_steps(shrinking, requests) == 12
    assert num_steps(padded(STEPS), requests) == 12


def test_a_padded_batch_keeps_its_rows(requests: list[Request]) -> None:
    engine = Engine(make_translator(), max_rows=4)
    padded(STEPS)(deque(requests), engine)
    for _ in range(7):
        assert engine.step() == []
        assert engine.num_rows == 4
    assert len(engine.step()) == 2


def test_nobody_begins_before_the_last_has_ended(requests: list[Request]) -> None:
    engine, waiting = Engine(make_translator(), max_rows=4), deque(requests)
    shrinking(waiting, engine)
    assert len(waiting) == 1 and next_batch(waiting, engine) == []


@pytest.mark.parametrize("policy", [continuous, shrinking, padded(STEPS)])
def test_every_request_is_answered(policy: Policy, requests: list[Request]) -> None:
    point = serve(Engine(make_translator(), max_rows=4), policy, Workload(requests, STEPS, gaps(3)), rate=1000.0)
    assert 0 < point.p50_ms <= point.p99_ms
    assert 0 < point.row_occupancy <= 1


def test_knee_is_interpolated() -> None:
    points = [Point(rate, rate, 1.0, p99, 0.5) for rate, p99 in ((1.0, 10.0), (2.0, 20.0), (3.0, 60.0))]
    assert knee(points, 40.0) == pytest.approx(2.5)
    assert knee(points, 5.0) == 0.0
    assert knee(points, 100.0) == 3.0
