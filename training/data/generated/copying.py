"""The copy problem (Hochreiter and Schmidhuber 1997, in the form of Arjovsky et al. 2016): ten symbols, a long time of
nothing, then a sign to write the ten symbols down.

Every step has a label. Without memory of the symbols nothing is better than to guess each, which costs
10 ln(8) / 220 = 0.0945 nats a step.
"""

import random
from collections.abc import Sequence

from training.data.generated.distinct import distinct_splits
from training.data.rows import Row

SYMBOLS, LENGTH, DELAY = "abcdefgh", 10, 200
NOTHING, NOW = "-", "now"


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    symbols = source.choices(SYMBOLS, k=LENGTH)
    words = [*symbols, *[NOTHING] * (DELAY - 1), NOW, *[NOTHING] * LENGTH]
    return Row(tuple(words), (*[NOTHING] * (LENGTH + DELAY), *symbols))
