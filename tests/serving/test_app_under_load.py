"""Deadlines, a stalled or failing engine, a full queue: what is answered, and that the service lives on."""

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest

from .conftest import INPUTS, InProcess, error_of, events_of, in_process
from .fakes import FakePipeline


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", ""])
def test_a_time_limit_that_is_none(server: InProcess, seconds: str) -> None:
    response = server.post("/v1/translate", {"inputs": "x"}, headers={"x-request-timeout-seconds": seconds})
    assert error_of(response, 400)["code"] == "invalid_value"


def test_deadline(server: InProcess) -> None:
    pipeline = FakePipeline("translate", step_s=0.05)
    with in_process({"slow": pipeline}) as slow:
        headers = {"x-request-timeout-seconds": "0.3"}
        response = slow.post("/v1/translate", {"inputs": "a " * 30}, headers=headers)
        assert error_of(response, 408)["code"] == "deadline_passed"
        assert not pipeline.live
        events = events_of(slow.post("/v1/translate", {"inputs": "a " * 30, "stream": True}, headers=headers))
        assert events[0][0] == "delta" and events[-1][0] == "error"


@pytest.mark.parametrize("seconds", [0.15, 0.3])
def test_a_short_deadline_is_answered_before_it_passes(seconds: float) -> None:
    """Ray's proxy would answer in bare text then. A step in mid-turn does not hold the answer back."""
    with in_process({"slow": FakePipeline("translate", step_s=1.0)}) as slow:
        started = time.monotonic()
        headers = {"x-request-timeout-seconds": str(seconds)}
        assert error_of(slow.post("/v1/translate", {"inputs": "a b"}, headers=headers), 408)
        assert time.monotonic() - started < seconds + 0.3  # what a busy machine may add; a step takes a second


@pytest.mark.parametrize("path", [*INPUTS, "/v1/score", "/v1/completions"])
def test_every_pipeline_is_told_the_deadline(path: str) -> None:
    bodies: dict[str, Any] = {
        "/v1/score": {"model": "story", "targets": "x"},
        "/v1/completions": {"model": "story", "prompt": "x"},
    }
    with in_process() as server:
        latest = time.monotonic() + 5
        body = bodies.get(path) or {"inputs": INPUTS[path]}
        assert server.post(path, body, headers={"x-request-timeout-seconds": "5"}).status_code == 200
        ((job,),) = (pipeline.submitted for pipeline in server.pipelines.values() if pipeline.submitted)
        assert latest - 0.3 < job.deadline < latest + 2


def test_a_stalled_engine_answers_408_and_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.service.GRACE_S", 0.2)
    pipeline = FakePipeline("translate")
    with in_process({"slow": pipeline}, stall_after_s=0.4) as server:
        pipeline.gate.clear()
        response = server.post("/v1/translate", {"inputs": "a"}, headers={"x-request-timeout-seconds": "0.5"})
        assert error_of(response, 408)["code"] == "deadline_passed"
        report = server.get("/readyz")
        assert report.status_code == 503 and report.json()["turning"] is False
        assert server.get("/healthz").status_code == 200


def test_engine_failure_is_500_with_a_fixed_text_and_the_service_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    with in_process() as server:
        server.pipelines["mood"].failing_steps = 1
        response = server.post("/v1/classify", {"inputs": "x"})
        error = error_of(response, 500)
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert "secret" not in response.text and "secret detail" in caplog.text
        assert server.post("/v1/classify", {"inputs": "x"}).status_code == 200


def test_unexpected_exception_is_500_with_a_fixed_text(caplog: pytest.LogCaptureFixture) -> None:
    with in_process() as server:
        server.pipelines["mood"].prepare = lambda *args, **kwargs: 1 / 0
        response = server.post("/v1/classify", {"inputs": "x"})
        assert error_of(response, 500)["code"] == "internal_error"
        assert "division" not in response.text and "ZeroDivisionError" in caplog.text


def test_full_queue_is_429_and_clears() -> None:
    pipeline = FakePipeline("translate")
    with in_process({"slow": pipeline}, max_requests=2, limits={"inputs": 2}) as server:

        async def crowd() -> list[httpx.Response]:
            pipeline.gate.clear()
            tasks = [asyncio.create_task(server.send("POST", "/v1/translate", json={"inputs": "a"})) for _ in range(5)]
            await asyncio.sleep(0.3)
            pipeline.gate.set()
            return await asyncio.gather(*tasks)

        responses = server.wait(crowd())
        assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert error_of(refused, 429)["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/translate", {"inputs": ["a", "b"]}).status_code == 200


async def crowd(server: InProcess, count: int, **kwargs: Any) -> list[int]:
    """The statuses of so many calls at once, each with half a second to live."""
    headers = {"content-type": "application/json", "x-request-timeout-seconds": "0.5"}
    calls = [server.send("POST", "/v1/translate", headers=headers, **kwargs) for _ in range(count)]
    return sorted(response.status_code for response in await asyncio.wait_for(asyncio.gather(*calls), 2))


def test_calls_in_preparation_take_places_and_expire() -> None:
    pipeline = FakePipeline("translate")
    hurry = threading.Event()
    prepare = pipeline.prepare

    def slowly(*args: Any, **kwargs: Any) -> Any:
        hurry.wait(30)
        return prepare(*args, **kwargs)

    pipeline.prepare = slowly  # type: ignore[method-assign]
    with in_process({"slow": pipeline}, max_requests=12, limits={"inputs": 2}) as server:
        for _ in range(2):  # the second time no thread of the pool is free
            assert server.wait(crowd(server, 30, json={"inputs": "a"})) == [408] * 12 + [429] * 18
        assert server.runner.num_open == 0 and not pipeline.submitted
        hurry.set()
        assert server.post("/v1/translate", {"inputs": ["a", "b"]}).status_code == 200


def test_a_body_that_does_not_come_expires(server: InProcess) -> None:
    async def endless() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    assert server.wait(crowd(server, 1, content=endless())) == [408]
    assert server.runner.num_open == 0


@pytest.mark.parametrize(("interval_s", "fewest", "most"), [(0.0, 25, 25), (0.1, 2, 8)])
def test_the_first_words_of_a_stream_come_at_once_and_later_ones_together(
    interval_s: float, fewest: int, most: int
) -> None:
    """Two sequences of a word each 10 ms. A client over ASGI sees the moments at which pieces are sent."""
    text = " ".join("abcdefghijklmnopqrstuvwxy")
    body = {"inputs": text, "num_beams": 2, "num_return_sequences": 2, "stream": True}
    with in_process({"en-de": FakePipeline("translate", step_s=0.01)}, stream_interval_s=interval_s) as server:
        events = events_of(server.post("/v1/translate", body))
    deltas = [data for name, data in events if name == "delta"]
    for sequence, ending in ((0, ""), (1, " #1")):
        own = [data["delta"] for data in deltas if data["sequence"] == sequence]
        assert "".join(own) == text.upper() + ending
        assert own[0] == "A" and fewest <= len(own) <= most + 1


def test_what_came_before_a_failure_is_sent() -> None:
    with in_process({"en-de": FakePipeline("translate", step_s=0.01)}, stream_interval_s=0.2) as server:
        threading.Timer(0.1, lambda: setattr(server.pipelines["en-de"], "failing_steps", 1)).start()
        events = events_of(server.post("/v1/translate", {"inputs": "a " * 29, "stream": True}))
    said = "".join(data["delta"] for name, data in events if name == "delta")
    assert events[-1][0] == "error" and len(said.split()) >= 4


def test_what_cannot_be_in_time_is_refused_before_it_is_read() -> None:
    headers = {"content-type": "application/json", "x-request-timeout-seconds": "5"}

    async def endless() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    with in_process({"slow": FakePipeline("translate")}) as server:
        server.models.served["slow"].pace.seconds = lambda *wanted: 9.0  # type: ignore[method-assign]
        response = server.wait(server.send("POST", "/v1/translate", content=endless(), headers=headers))
        assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "5"
        assert response.headers["x-refused-alike"] == "50"  # ms, in which HAProxy refuses those that are alike
        assert server.wait(server.send("POST", "/v1/classify", content=b"{}", headers=headers)).status_code != 429
        assert server.get("/v1/translate").status_code == 405
