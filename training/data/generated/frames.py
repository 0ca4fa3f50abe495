"""Generated clips of one moving shape: a label for each frame, one for the clip, or a caption.

The world wraps round at its edges and every clip starts anywhere, so a shape is equally likely in every place after
every move: one frame alone says nothing about a label. Nor do all frames of a clip tell a path from its way back, if
their order is not known.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops

from training.data.generated.distinct import distinct_splits
from training.data.generated.pictures import COLOURS, draw_shape, png
from training.data.rows import Row

SIZE = 16  # pixels, both ways
STEP = 3  # pixels a frame
MOVES = {"left": (-STEP, 0), "right": (STEP, 0), "up": (0, -STEP), "down": (0, STEP), "still": (0, 0)}
DIRECTIONS = ("left", "right", "up", "down")


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    """A label for each frame: the move that led to it."""
    return distinct_splits(_labelled_frames, seed, sizes)


def make_clips(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    """A label for each clip: where the shape went first, and where then."""
    return distinct_splits(_labelled_clip, seed, sizes)


def make_captions(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    """The same in words, with what it is that moves."""
    return distinct_splits(_captioned_clip, seed, sizes)


@dataclass(frozen=True)
class _Shape:
    """What moves, and from where."""

    colour: str
    name: str
    x: int
    y: int

    @classmethod
    def drawn(cls, source: random.Random) -> "_Shape":
        colour, name = source.choice(list(COLOURS)), source.choice(("square", "circle"))
        return cls(colour, name, source.randrange(SIZE), source.randrange(SIZE))

    def frames(self, moves: Sequence[str]) -> tuple[bytes, ...]:
        """A picture after each move."""
        x, y, frames = self.x, self.y, []
        for move in moves:
            x, y = (x + MOVES[move][0]) % SIZE, (y + MOVES[move][1]) % SIZE
            frames.append(self._frame(x, y))
        return tuple(frames)

    def _frame(self, x: int, y: int) -> bytes:
        picture = Image.new("RGB", (SIZE, SIZE))
        middle = SIZE // 2
        draw_shape(picture, self.name, self.colour, middle, middle, 3)
        return png(ImageChops.offset(picture, x - middle, y - middle))  # wraps round


def _labelled_frames(source: random.Random) -> Row:
    shape = _Shape.drawn(source)
    moves = _wandering(source)
    return Row(shape.frames(moves), tuple(moves))


def _labelled_clip(source: random.Random) -> Row:
    shape, path = _Shape.drawn(source), source.sample(DIRECTIONS, 2)
    return Row(shape.frames(_along(path, source)), " then ".join(path))


def _captioned_clip(source: random.Random) -> Row:
    shape, path = _Shape.drawn(source), source.sample(DIRECTIONS, 2)
    caption = f"a {shape.colour} {shape.name} moves {' then '.join(path)}"
    return Row(shape.frames(_along(path, source)), (caption,))


def _wandering(source: random.Random) -> list[str]:
    """Moves of which each goes on as often as not."""
    moves, move = [], "still"  # nothing led to the first frame
    for _ in range(source.randint(8, 12)):
        moves.append(move)
        if len(moves) == 1 or source.random() < 0.5:
            move = source.choice(list(MOVES))
    return moves


def _along(path: Sequence[str], source: random.Random) -> list[str]:
    return ["still", *(move for direction in path for move in [direction] * source.randint(2, 4))]
