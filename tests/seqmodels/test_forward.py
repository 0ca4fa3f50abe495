"""Whose turn it is where a single pass answers: by priority, and clients in turns; nobody's answer depends on it."""

import time

import torch

from seqmodels.config import ModelConfig
from seqmodels.decoding.padding import bucket
from seqmodels.decoding.request import Failed, Finished, Scores
from seqmodels.errors import DeadlineError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import build_model

ENCODER = {"input": "text", "vocab_size": 20, "embedding_size": 4, "recurrent": {"cell": "gru", "hidden_size": 4}}
POSITIONS = bucket(5)  # of each request below, padding included


def forward(max_requests: int) -> Forward:
    """That takes so many requests in a step."""
    torch.manual_seed(0)
    config = ModelConfig.parse({"architecture": "classifier", "encoder": ENCODER, "labels": ["a", "b"]})
    return Forward(build_model(config).eval(), max_positions=max_requests * POSITIONS)


def request(id: str, client: str = "", priority: int = 0, deadline: float | None = None) -> ForwardRequest:
    inputs = torch.arange(5) + len(id)
    return ForwardRequest(id, inputs, (), deadline, client=client, priority=priority)


def step(worker: Forward) -> list[str]:
    return [event.request_id for event in worker.step() if isinstance(event, Finished)]


def test_clients_take_turns() -> None:
    worker = forward(4)
    for i in range(6):
        worker.submit(request(f"many-{i}", "many"))
    for i in range(2):
        worker.submit(request(f"few-{i}", "few"))
    assert sorted(step(worker)) == ["few-0", "few-1", "many-0", "many-1"]
    assert step(worker) == ["many-2", "many-3", "many-4", "many-5"]


def test_the_urgent_go_first_and_the_late_are_told() -> None:
    worker = forward(1)
    now = time.monotonic()
    for one in (request("low", priority=-1), request("normal"), request("late", deadline=now - 1),
                request("high", priority=1), request("soon", deadline=now + 60)):  # fmt: skip
        worker.submit(one)
    first = worker.step()
    assert isinstance(first[0], Failed) and first[0].request_id == "late" and isinstance(first[0].error, DeadlineError)
    assert first[1].request_id == "high"
    assert [step(worker) for _ in range(3)] == [["soon"], ["normal"], ["low"]] and not worker.has_work


def test_answers_are_the_same_in_any_order() -> None:
    ids = ["one", "three", "fives", "sevenths"]
    answers = []
    for clients in (["a", "a", "b", "b"], ["x", "y", "x", "y"]):
        worker = forward(2)
        for id, client in zip(ids, clients, strict=True):
            worker.submit(request(id, client))
        events = [event for _ in range(2) for event in worker.step()]
        answers.append({e.request_id: e.result for e in events if isinstance(e, Finished)})
    assert answers[0].keys() == answers[1].keys() == set(ids)
    for one, other in ((answers[0][id], answers[1][id]) for id in ids):
        assert isinstance(one, Scores) and isinstance(other, Scores) and torch.equal(one.values, other.values)


def test_who_is_cancelled_has_no_turn() -> None:
    worker = forward(4)
    for id in ("kept", "gone"):
        worker.submit(request(id))
    worker.cancel("gone")
    assert worker.num_waiting == 1 and step(worker) == ["kept"]
