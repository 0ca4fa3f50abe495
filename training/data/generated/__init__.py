"""Data sets that this code makes itself: small, free of licences, with a known right answer.

Each is a function of a seed and three sizes that returns splits which share no item.
"""

from collections.abc import Callable, Sequence

from training.data.generated import (
    adding,
    captions,
    copying,
    frames,
    language_model,
    number_tags,
    numbers,
    sentiment,
    series,
)
from training.data.rows import Row

DATA_SETS: dict[str, Callable[[int, Sequence[int]], dict[str, list[Row]]]] = {
    "sentiment": sentiment.make,
    "numbers-en-fr": numbers.make,
    "captions": captions.make,
    "number-tags": number_tags.make,
    "frames": frames.make,
    "clips": frames.make_clips,
    "clip-captions": frames.make_captions,
    "series": series.make,
    "language-model": language_model.make,
    "adding": adding.make,
    "copy": copying.make,
}

SIZES: dict[str, tuple[int, int, int]] = {  # rows of train, validation, test
    "sentiment": (6000, 500, 1000),
    "numbers-en-fr": (12000, 300, 500),
    "captions": (4000, 200, 500),
    "number-tags": (3000, 300, 500),
    "frames": (1500, 150, 300),
    "clips": (1500, 150, 500),
    "clip-captions": (1500, 150, 500),
    "series": (2000, 200, 500),
    "language-model": (6000, 500, 500),
    "adding": (8000, 500, 500),
    "copy": (8000, 500, 500),
}


def generate(name: str, seed: int = 1) -> dict[str, list[Row]]:
    """The named data set at its usual size."""
    return DATA_SETS[name](seed, SIZES[name])
