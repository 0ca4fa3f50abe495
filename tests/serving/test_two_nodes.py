"""A node dies while clients are served: nobody notices who asks through our client.

Two nodes of Ray on this machine, a replica on each; see nodes.py.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from seqmodels.pipeline import Pipeline
from serving.client import Client
from serving.questions import Asking

from .test_service import ROOT, free_port

CLIENTS = 6


class Nodes:
    """The cluster, and the words that it obeys."""

    def __init__(self, config: Path, ray_home: str) -> None:
        self.url = f"http://127.0.0.1:{yaml.safe_load(config.read_text())['port']}"
        own = {
            "RAY_TMPDIR": ray_home, "RAY_AUTH_TOKEN_PATH": f"{ray_home}/token", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # the first node's proxy would ask its own replica alone
        }  # fmt: skip
        self.errors = (config.parent / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.nodes", str(config)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env={**os.environ, **own},
        )  # fmt: skip

    def hear(self, word: str) -> None:
        assert self.process.stdout
        for line in self.process.stdout:  # Ray says much besides
            if line.strip() == word:
                return
        self.errors.seek(0)
        raise AssertionError(self.errors.read())

    def say(self, word: str, answer: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.hear(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.errors.close()


@pytest.fixture
def nodes(models: dict[str, str], tmp_path: Path) -> Iterator[Nodes]:
    config = tmp_path / "service.yaml"
    fields = {"models": {name: models[name] for name in ("mood", "story")}, "port": free_port(), "replicas": 2}
    config.write_text(yaml.safe_dump({**fields, "drain_s": 1.0}))
    ray_home = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    running = Nodes(config, ray_home)
    try:
        running.hear("ready")
        yield running
    finally:
        running.end()
        shutil.rmtree(ray_home, ignore_errors=True)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if ray_home in read(path)]
    assert not left


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


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


def test_a_node_dies_and_another_comes(nodes: Nodes, models: dict[str, str], asked_again: list[Exception]) -> None:
    """No answer is lost, wrong or another's, and they go on throughout."""
    story, stop = Pipeline.from_pretrained(models["story"]), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_on, nodes.url, first, stop) for first in range(CLIENTS)]
        try:
            time.sleep(3)
            before = len(asked_again)
            killed_at = time.monotonic()
            nodes.say("kill", "killed")
            time.sleep(3)
            assert is_ready(nodes.url)
            nodes.say("add", "added")
            back_at = time.monotonic()
            assert is_ready(nodes.url)
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
