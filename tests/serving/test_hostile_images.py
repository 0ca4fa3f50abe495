"""Those of `make hostile`, fewer of them; and that what they are held to can be broken."""

import subprocess
import sys

import pytest

from .fuzz_valid import Reply
from .hostile_files import KINDS
from .hostile_images import WAYS, Peak, fault_of, turn


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of memory is Linux's")
def test_hostile_images() -> None:
    """In a process of its own, whose memory nobody else takes or gives back."""
    command = [sys.executable, "-m", "tests.serving.hostile_images", "--count", str(2 * len(KINDS) * len(WAYS))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answered" in done.stdout and "invalid_image" in done.stdout


def test_all_kinds_come_in_all_ways() -> None:
    turns = {turn(number) for number in range(len(KINDS) * len(WAYS))}
    assert turns == {(kind, way) for kind in KINDS for way in WAYS}


@pytest.mark.parametrize(
    ("kind", "status", "content", "fault"),
    [
        ("damaged", 200, b"{}", None),
        ("no picture", 200, b"{}", "it was answered"),
        ("damaged", 500, b"{}", "status 500"),
        ("damaged", 400, b'{"error": {"message": "broken", "type": "x", "param": null, "code": "y"}}', "another kind"),
    ],
)
def test_a_fault_is_found(kind: str, status: int, content: bytes, fault: str | None) -> None:
    found = fault_of(kind, Reply(status, "application/json", content, 0.1))
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of memory is Linux's")
def test_memory_that_is_given_back_is_counted() -> None:
    peak = Peak()
    peak.begin()
    taken = bytearray(150_000_000)
    taken[::4096] = b"x" * len(taken[::4096])
    del taken
    assert 145 < peak.extra_mb() < 170
