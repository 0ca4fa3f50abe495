"""Requests that nobody thought of: none may get a 5xx, and the valid ones among them must get the right answer.

Those of `make fuzz`, fewer of them, and some that are made from the description of the API.
"""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import schema

from .conftest import InProcess, in_process
from .fuzz import SHAPES, Around, fuzz, make_bank, steady_allocator
from .fuzz_requests import DAMAGES, request
from .fuzz_valid import Bank

NUM_REQUESTS = 20_000
POSTED = [path for path in SHAPES if path != "/v1/models"]
SEED = 0


@pytest.fixture(scope="module")
def server() -> Iterator[InProcess]:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with in_process() as running:
        yield running
        assert running.runner.num_open == 0
        assert not any(pipeline.live for pipeline in running.pipelines.values())


def check_shape(path: str, response: httpx.Response, documented: set[int]) -> None:
    """No 5xx, a documented status, and a body of the documented shape."""
    assert response.status_code < 500 and response.status_code in documented, (response.status_code, response.text)
    if response.status_code != 200:
        schema.ErrorResponse.model_validate_json(response.content)
    elif not response.headers["content-type"].startswith("text/event-stream"):
        SHAPES[path].model_validate_json(response.content)


@pytest.mark.parametrize("path", POSTED)
def test_requests_made_from_the_openapi_description(server: InProcess, path: str) -> None:
    document = server.app.openapi()
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    documented = {int(status) for status in document["paths"][path]["post"]["responses"]}
    by_the_book = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    against_it = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=by_the_book | against_it)
    def ask(case: Any) -> None:
        prepared = case.as_transport_kwargs(base_url="http://test")
        sent = {name: prepared[name] for name in ("json", "headers", "params") if prepared.get(name) is not None}
        if isinstance(prepared.get("data"), str | bytes):
            sent["content"] = prepared["data"]
        check_shape(path, server.request("POST", path, **sent), documented)

    ask()


# -- our own


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank(SEED)


def test_damaged_requests_and_a_fifth_valid_ones(bank: Bank) -> None:
    steady_allocator()
    tally = fuzz(bank, range(NUM_REQUESTS), SEED)
    assert not tally.violations, tally.violations
    assert tally.num_asked == NUM_REQUESTS and tally.num_golden == NUM_REQUESTS // 5
    assert {kind for kind, _, _ in tally.counts} == {"valid", *DAMAGES}
    assert {200, 400, 401, 404, 405, 408, 413, 415, 421, 422} <= {status for _, _, status in tally.counts}


# -- the check itself: each fault that it looks for is planted once, and found


def with_fault(fault: Any) -> Around:
    """Calls `fault` with the path of each request and a function that answers with a status, before the app's turn."""

    def around(app: ASGIApp) -> ASGIApp:
        async def planted(scope: Scope, receive: Receive, send: Send) -> None:
            async def answer(status: int) -> None:
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b"{}"})

            if not await fault(scope["path"], answer):
                await app(scope, receive, send)

        return planted

    return around


async def answers_500(path: str, answer: Any) -> bool:
    if path == "/v1/models/\x00":
        await answer(500)
    return path == "/v1/models/\x00"


async def crashes(path: str, answer: Any) -> bool:
    if path == "/v1/models/\x00":
        raise RuntimeError("planted")
    return False


async def never_answers(path: str, answer: Any) -> bool:
    return path == "/v1/models/\x00"


async def hangs(path: str, answer: Any) -> bool:
    if path == "/v1/models/\x00":
        await asyncio.sleep(1.05)
    return False


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (answers_500, "status 500"),
        (crashes, "it raised RuntimeError('planted')"),
        (never_answers, "no answer"),
        (hangs, "slow each time"),
    ],
)
def test_a_planted_fault_is_found(bank: Bank, fault: Any, told: str) -> None:
    number = next(n for n in range(100_000) if request(bank, SEED, n).path == "/v1/models/\x00")
    tally = fuzz(bank, range(number, number + 20), SEED, around=with_fault(fault))
    (violation,) = tally.violations
    assert violation.startswith(f"request {number} of seed {SEED}, paths: {told}"), violation


def test_a_wrong_answer_is_found(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [replace(golden, expected=[golden.expected]) for golden in bank.posts]
    monkeypatch.setattr(bank, "posts", [*bank.posts[1:], wrong[0]])
    numbers = [n for n in range(0, 100_000, 5) if request(bank, SEED, n).golden is bank.posts[-1]]
    tally = fuzz(bank, range(numbers[0], numbers[0] + 1), SEED)
    (violation,) = tally.violations
    assert "a wrong answer" in violation and bank.posts[-1].path in violation


def test_a_leak_is_found(bank: Bank) -> None:
    kept = []

    async def leaks(path: str, answer: Any) -> bool:
        kept.append(bytearray(200_000))
        return False

    tally = fuzz(bank, range(400), SEED, around=with_fault(leaks))
    assert tally.growth_mb > 35 and "memory has grown" in tally.violations[-1]


def test_a_request_can_be_made_again(bank: Bank) -> None:
    for number in range(300):
        assert request(bank, SEED, number) == request(bank, SEED, number)
