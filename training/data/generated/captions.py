"""Generated scenes of one or two coloured shapes, with a caption that says what is where."""

import random
from collections.abc import Sequence

from PIL import Image

from training.data.generated.distinct import distinct_splits
from training.data.generated.pictures import COLOURS, SHAPES, draw_shape, png
from training.data.rows import Row

SIZE = 32  # pixels, both ways
CENTRES = {"left": (8, 16), "right": (24, 16), "top": (16, 8), "bottom": (16, 24), "middle": (16, 16)}
# The words, and the places of both shapes. A caption begins at the left or the top, so each scene has one caption.
RELATIONS = (("left of", "left", "right"), ("above", "top", "bottom"))


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    grey = source.randint(0, 60)
    picture = Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))
    if source.random() < 0.3:
        place = source.choice(list(CENTRES))
        words = f"{_shape(source, picture, place)} {'in' if place == 'middle' else 'at'} the {place}"
    else:
        relation, first, second = source.choice(RELATIONS)
        words = f"{_shape(source, picture, first)} {relation} {_shape(source, picture, second)}"
    return Row(png(picture), (words,))


def _shape(source: random.Random, picture: Image.Image, place: str) -> str:
    """Draw a random shape near a place; return what a caption calls it."""
    colour, shape = source.choice(list(COLOURS)), source.choice(SHAPES)
    x, y = CENTRES[place]
    draw_shape(picture, shape, colour, x + source.randint(-1, 1), y + source.randint(-1, 1), source.randint(4, 6))
    return f"a {colour} {shape}"
