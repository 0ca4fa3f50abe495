"""`make chaos` in small: a replica that is really killed, clients that leave, swaps, silent connections.

What breaks a promise must be found, too: answers that are wrong, requests that are lost.
"""

import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.running import ROOT

from .chaos import Kill, Load, kill


@pytest.mark.slow  # more than half a minute: a replica has to start again, and silence has to last
def test_in_small() -> None:
    small = ["--kills", "1", "--leaves", "20", "--swaps", "5", "--silent", "30"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serving.chaos", *small], cwd=ROOT, capture_output=True, text=True, timeout=550
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    parts = {part["part"]: part for part in map(json.loads, ran.stdout.splitlines())}
    assert list(parts) == ["kills", "leaves", "swaps", "silent"]
    assert parts["kills"]["with_client"]["right"] and parts["swaps"]["refused"] == 1 and parts["silent"]["right"]


class OneAnswer:
    def is_right(self, name: str, text: str, answer: dict[str, str]) -> bool:
        return answer["results"] == "right"


def test_wrong_and_lost_answers_are_counted() -> None:
    answers = iter([{"results": "right"}, {"results": "wrong"}])

    def ask(name: str, text: str) -> dict[str, str]:
        try:
            return next(answers)
        except StopIteration:
            time.sleep(0.01)
            raise RuntimeError("500") from None

    load = Load("", OneAnswer())  # type: ignore[arg-type]
    with load.asking(1, ask):
        while not load.failures:
            time.sleep(0.01)
    assert (load.right, load.wrong) == (1, 1) and "500" in load.failures[0][2]


def test_who_may_fail_when_a_replica_is_killed() -> None:
    one = Kill(sent=10.0, gone=10.1)
    assert one.explains(9.9, 10.2)
    assert one.explains(10.05, 10.2)  # asked while it was dying
    assert not one.explains(9.9, 15.05)  # told too late
    assert not one.explains(10.15, 10.2)  # asked when it was gone
    assert not one.explains(9.5, 9.9)  # failed for nothing


def test_a_process_is_gone_after_its_kill() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        began = time.monotonic()
        one = kill(sleeping.pid)
        assert began <= one.sent < one.gone <= time.monotonic()
        assert sleeping.poll() == -signal.SIGKILL
