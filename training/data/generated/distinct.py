"""Draw items until enough are different, then deal them into splits."""

import random
from collections.abc import Callable, Sequence

from training.data.rows import Row

SPLITS = ("train", "validation", "test")


def distinct_splits(draw: Callable[[random.Random], Row], seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    """Splits of the given sizes in which no input (no target, where nothing goes in) occurs twice.

    draw: makes one row from a source of random numbers; must be able to make more rows than are asked for.
    """
    source = random.Random(seed)
    rows: dict[object, Row] = {}
    while len(rows) < sum(sizes):
        row = draw(source)
        rows.setdefault(row.target if row.input is None else row.input, row)
    drawn = iter(rows.values())
    return {name: [next(drawn) for _ in range(size)] for name, size in zip(SPLITS, sizes, strict=True)}
