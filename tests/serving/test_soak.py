"""The soak's rules, on memory whose growth is known and on answers that are wrong; where long checks are wanted, a
short soak of a real service."""

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from benchmarks.running import ROOT
from seqmodels.pipeline import Pipeline

from .conftest import InProcess, in_process
from .golden import PATHS, Golden
from .soak import KINDS, RIGHT, Report, Soak, Trend, batch, leave, stream, trend

SECONDS = np.arange(0.0, 1800.0, 2.0)
CHANCE = np.random.default_rng(3)
NOISE = CHANCE.normal(0.0, 1.0, len(SECONDS))


def alike(strength: float) -> np.ndarray:
    """Noise in which each sample is like the one before."""
    values = [0.0]
    for one in NOISE[1:]:
        values.append(strength * values[-1] + one)
    return np.asarray(values)


def leak(mb_in_10_minutes: float) -> np.ndarray:
    return mb_in_10_minutes * SECONDS / 600.0


WARMING = 80.0 * (1.0 - np.exp(-SECONDS / 100.0))  # caches that fill
FLAT = {
    "nothing moves": np.zeros_like(SECONDS),
    "noise": NOISE,
    "noise that stays": alike(0.95),
    "one step": 8.0 * (SECONDS > 1300.0),
    "one step in noise": 8.0 * (SECONDS > 1350.0) + 0.1 * NOISE,
    "a step that ends": 30.0 * ((SECONDS > 1200.0) & (SECONDS < 1400.0)) + NOISE,
    "a saw-tooth": (SECONDS % 90.0) / 3.0,
    "warming up": WARMING + NOISE,
    "less than is allowed": leak(0.5) + 0.3 * NOISE,
    "memory given back": leak(-20.0) + NOISE,
}
GROWING = {
    "a slow leak": leak(4.0) + NOISE,
    "a leak in noise that stays": leak(15.0) + alike(0.95),
    "a leak in a saw-tooth": leak(10.0) + (SECONDS % 90.0) / 10.0,
    "a leak in steps": 4.0 * np.floor(SECONDS / 60.0),
    "a leak after warming up": WARMING + leak(5.0) + NOISE,
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_memory_is_within_noise(name: str) -> None:
    found = trend(SECONDS.tolist(), (500.0 + FLAT[name]).tolist())
    assert not found.grows and not found.is_blurred, found


@pytest.mark.parametrize("name", GROWING)
def test_growing_memory_is_found(name: str) -> None:
    found = trend(SECONDS.tolist(), (500.0 + GROWING[name]).tolist())
    assert found.grows, found


def test_the_slope_is_that_of_the_second_half() -> None:
    memory = np.where(SECONDS < 900.0, 100.0 * SECONDS, 90_000.0 + leak(6.0))
    found = trend(SECONDS.tolist(), memory.tolist())
    assert found.slope == pytest.approx(6.0) and found.low == pytest.approx(6.0) and found.high == pytest.approx(6.0)


def test_noise_that_hides_everything_is_no_proof() -> None:
    found = trend(SECONDS.tolist(), (200.0 * NOISE).tolist())
    assert found.is_blurred and "nobody can tell" in str(found)
    assert not Trend(0.0, -0.5, 0.5).is_blurred


# -- its requests


@pytest.fixture(scope="module")
def golden(models: dict[str, str]) -> Golden:
    return Golden({name: [models[name]] for name in PATHS})


@pytest.fixture(scope="module")
def server(models: dict[str, str]) -> Iterator[InProcess]:
    with in_process({name: Pipeline.from_pretrained(models[name]) for name in PATHS}) as running:
        yield running


async def outcomes(transport: httpx.AsyncBaseTransport, golden: Golden, times: int = 8) -> list[str]:
    """What the soak makes of so many requests of each kind."""
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        soak = Soak(client, golden, random.Random(0))
        return [f"{kind.__name__} {await kind(soak)}" for kind, _ in KINDS for _ in range(times)]


def failures(outcomes: list[str]) -> list[str]:
    return Report(1.0, [], Counter(outcomes), [], {}).failures


def test_right_answers_are_no_failures(server: InProcess, golden: Golden) -> None:
    found = server.wait(outcomes(httpx.ASGITransport(server.app), golden))
    assert set(found) == RIGHT and not failures(found)


def test_wrong_answers_are_found(server: InProcess, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those kinds whose answers are known, each is wrong."""
    monkeypatch.setattr(golden, "_answers", {key: answers[::-1] for key, answers in golden._answers.items()})
    found = server.wait(outcomes(httpx.ASGITransport(server.app), golden))
    assert {f"{kind} wrong" for kind in ("classify", "tag", "translate", "stream", "batch")} <= set(found)
    assert len(failures(found)) == 5


@pytest.mark.parametrize("status", [500, 502, 503])
def test_every_5xx_is_a_failure(golden: Golden, status: int) -> None:
    found = asyncio.run(outcomes(httpx.MockTransport(lambda request: httpx.Response(status)), golden, 1))
    assert found == [f"{kind.__name__} {status}" for kind, _ in KINDS] and len(failures(found)) == len(KINDS)


def test_a_5xx_in_a_batch_or_a_stream_is_a_failure(golden: Golden) -> None:
    line = json.dumps({"response": {"status_code": 503, "body": {}}})

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/batch":
            return httpx.Response(200, text="\n".join([line] * 5))
        return httpx.Response(200, text='event: error\ndata: {"error": {}}\n\n')

    async def ask() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://127.0.0.1") as client:
            soak = Soak(client, golden, random.Random(0))
            return [await kind(soak) for kind in (batch, stream, leave)]

    assert asyncio.run(ask()) == ["broken", "wrong", "broken"]


def test_a_busy_machine_may_refuse_one_in_a_hundred() -> None:
    fine = ["tag 200"] * 991
    assert not failures([*fine, *["tag 429"] * 5, *["tag 408"] * 4])
    assert failures([*fine, *["tag 429"] * 12]) == ["requests for which it was too busy: 12"]
    assert failures([*fine, "tag RemoteProtocolError", "leave 200", "classify 400"])[0] == "tag RemoteProtocolError: 1"


@pytest.mark.slow
@pytest.mark.parametrize("leak", [(), ("--plant-leak", "10000")])
def test_a_short_soak(leak: tuple[str, ...]) -> None:
    """At a low load, for the machine may be busy: no answer is wrong and memory does not grow, but for a leak."""
    command = [sys.executable, "-m", "tests.serving.soak", "--minutes", "2", "--load", "0.4", *leak]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
