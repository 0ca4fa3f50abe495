"""The adding problem (Hochreiter and Schmidhuber 1997): a long series of numbers, two of them marked; their sum?

One mark stands in the first half and one in the second, so nothing but memory over hundreds of steps solves it. Always
to answer 1 has a mean square error of 1/6.
"""

import random
from collections.abc import Sequence

from training.data.generated.distinct import distinct_splits
from training.data.rows import Row

STEPS = 600
# Every step of every row is one of these: so many rows would not fit into memory otherwise.
PLAIN, MARKED = ([(number / 100, mark) for number in range(101)] for mark in (0.0, 1.0))


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    numbers = source.choices(range(101), k=STEPS)
    first, second = source.randrange(STEPS // 2), source.randrange(STEPS // 2, STEPS)
    steps = [PLAIN[number] for number in numbers]
    for place in (first, second):
        steps[place] = MARKED[numbers[place]]
    return Row(tuple(steps), (repr((numbers[first] + numbers[second]) / 100),))
