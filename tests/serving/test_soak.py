"""The soak's rule, on memory whose growth is known; where long checks are wanted, a short soak of a real service."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .soak import Trend, trend

ROOT = Path(__file__).parents[2]
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


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--plant-leak", "100000")])
def test_a_short_soak(arguments: tuple[str, ...]) -> None:
    """Too short to tell small leaks: one of 100 kB a request must be found, and no request may fail."""
    command = [sys.executable, "-m", "tests.serving.soak", "--minutes", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=400)
    if arguments:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert "requests that failed" not in done.stdout and "capacity" in done.stdout, done.stdout + done.stderr
