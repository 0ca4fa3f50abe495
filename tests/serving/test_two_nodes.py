"""A node dies while clients are served: nobody notices who asks through our client.

Two nodes of Ray on this machine, a replica on each; see nodes.py.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.running import Running, running
from seqmodels.pipeline import Pipeline
from serving.client import Client
from serving.questions import Asking

CLIENTS = 6


@pytest.fixture
def nodes(models: dict[str, str]) -> Iterator[Running]:
    two = {name: models[name] for name in ("mood", "story")}
    # Otherwise the first node's proxy would ask its own replica alone.
    environment = {"RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
    with running(two, environment, "tests.serving.nodes", replicas=2, drain_s=1.0) as service:
        yield service


def tell(nodes: Running, word: str, answer: str) -> None:
    assert nodes.process.stdin
    nodes.process.stdin.write(f"{word}\n".encode())
    nodes.process.stdin.flush()
    nodes.wait_until_it_says(answer)


def options(seed: int) -> dict[str, Any]:
    return {"do_sample": True, "seed": seed, "max_new_tokens": 100, "min_new_tokens": 100}


def ask_on(url: str, first_seed: int, stop: threading.Event) -> list[tuple[float, int, Any]]:
    """One client, one question after another, each of its own seed: when it was answered, the seed, the answer."""
    answers = []
    with Client(url, timeout_s=60) as client:
        for seed in itertools.count(first_seed, CLIENTS):
            answer = client.generate("on", **options(seed))  # raises where it was lost
            answers.append((time.monotonic(), seed, answer.model_dump(exclude_none=True)["results"]))
            if stop.is_set():
                break
    return answers


def is_ready(url: str) -> bool:
    """Whether a replica answers, and says so of itself."""
    response = httpx.get(f"{url}/readyz", timeout=30)
    return response.status_code == 200 and response.json()["ready"] and "story" in response.json()["models"]


@pytest.fixture
def asked_again(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Why each question was that our clients asked again."""
    reasons: list[Exception] = []
    pause_after = Asking.pause_after

    def noted(asking: Asking[Any], error: Any) -> float:
        reasons.append(error)
        return pause_after(asking, error)

    monkeypatch.setattr(Asking, "pause_after", noted)
    return reasons


def test_a_node_dies_and_another_comes(nodes: Running, models: dict[str, str], asked_again: list[Exception]) -> None:
    """No answer is lost, wrong or another's, and they go on throughout."""
    story, stop = Pipeline.from_pretrained(models["story"]), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_on, nodes.address, first, stop) for first in range(CLIENTS)]
        try:
            time.sleep(3)
            before = len(asked_again)
            killed_at = time.monotonic()
            tell(nodes, "kill", "killed")
            time.sleep(3)
            assert is_ready(nodes.address)
            tell(nodes, "add", "added")
            back_at = time.monotonic()
            assert is_ready(nodes.address)
            time.sleep(2)
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result()]
    assert not before and asked_again  # what the dead replica had; all of it was then answered, or ask_on had raised
    times = sorted(at for at, _, _ in answers)
    assert times[0] < killed_at and times[-1] > back_at
    longest_gap = max(later - at for at, later in itertools.pairwise(times))
    assert longest_gap < 20  # seconds; it was 0.6 on a busy machine, 2 on a very busy one
    for _, seed, answer in answers:
        assert answer == story(["on"], **options(seed))
