"""Generated numeric series of five kinds: two numbers a step, one the signal with noise, one noise alone."""

import math
import random
from collections.abc import Callable, Sequence

from training.data.generated.distinct import distinct_splits
from training.data.rows import Row

NOISE = 0.15
# Each has period 1, and values from -1 to 1.
WAVES: dict[str, Callable[[float], float]] = {
    "sine": lambda phase: math.sin(2 * math.pi * phase),
    "square": lambda phase: 1.0 if phase % 1 < 0.5 else -1.0,
    "rising": lambda phase: 2 * (phase % 1) - 1,
    "falling": lambda phase: 1 - 2 * (phase % 1),
    "pulse": lambda phase: 1.0 if phase % 1 < 0.15 else -0.2,
}


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    kind = source.choice(list(WAVES))
    period, phase, height = source.uniform(8, 16), source.random(), source.uniform(0.7, 1.3)
    steps = tuple(
        (
            round(height * WAVES[kind](phase + step / period) + source.gauss(0, NOISE), 4),
            round(source.gauss(0, 1), 4),
        )
        for step in range(source.randint(32, 56))
    )
    return Row(steps, kind)
