"""Generated clips of one moving shape; each frame is labelled with the move that led to it.

The world wraps round at its edges and every clip starts anywhere, so a shape is equally likely in every place after
every move: one frame alone says nothing about its label.
"""

import random
from collections.abc import Sequence

from PIL import Image, ImageChops

from training.data.generated.distinct import distinct_splits
from training.data.generated.pictures import COLOURS, draw_shape, png
from training.data.rows import Row

SIZE = 16  # pixels, both ways
STEP = 3  # pixels a frame
MOVES = {"left": (-STEP, 0), "right": (STEP, 0), "up": (0, -STEP), "down": (0, STEP), "still": (0, 0)}


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    colour, shape = source.choice(list(COLOURS)), source.choice(("square", "circle"))
    x, y = source.randrange(SIZE), source.randrange(SIZE)
    frames, labels, move = [], [], "still"  # nothing led to the first frame
    for _ in range(source.randint(8, 12)):
        x, y = (x + MOVES[move][0]) % SIZE, (y + MOVES[move][1]) % SIZE
        frames.append(_frame(shape, colour, x, y))
        labels.append(move)
        if len(frames) == 1 or source.random() < 0.5:
            move = source.choice(list(MOVES))
    return Row(tuple(frames), tuple(labels))


def _frame(shape: str, colour: str, x: int, y: int) -> bytes:
    picture = Image.new("RGB", (SIZE, SIZE))
    middle = SIZE // 2
    draw_shape(picture, shape, colour, middle, middle, 3)
    return png(ImageChops.offset(picture, x - middle, y - middle))  # wraps round
