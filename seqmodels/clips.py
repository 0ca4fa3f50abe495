"""Clips: the picture files of a directory in their order, and how large an animated file is before any of it is drawn.

Knows names and headers; `preprocessing` draws. Imports Pillow only when called.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
MOVING = ("GIF", "WEBP", "PNG")  # of which a file may hold frames; further pictures in a JPEG are not of another time
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


def is_directory(named: Any) -> bool:
    """Whether a user named one; no name is not the directory that we are in."""
    try:
        return isinstance(named, str) and named != "" and Path(named).is_dir()
    except (OSError, ValueError):  # a text too long for a name, or with a zero in it
        return False


def frame_files(directory: Path) -> list[Path]:
    """The pictures of a directory, in the natural order of their names: frame2.png before frame10.png. What does not
    end like a picture is no frame. Raises InputError where there is none."""
    files = [path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise InputError(f"{str(directory)!r} holds no file that ends in one of {', '.join(SUFFIXES)}", code="empty")
    return sorted(files, key=_natural)


class PictureFile(io.BytesIO):
    """What Pillow opens. It reads a file part by part, of which 4 MiB can hold millions that say nothing, and take
    seconds: so many reads as no real picture needs are an error."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads_left = 20_000 + len(data) // 64

    def read(self, size: int | None = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise OSError("too many parts")
        return super().read(size)


def extent(data: bytes) -> tuple[int, int]:
    """How many frames a file has, 1 if it is still, and how many pixels the largest of them; nothing is drawn. (0, 0)
    where it is no picture: whoever draws it will say why."""
    from PIL import Image

    try:
        with Image.open(PictureFile(data), formats=FORMATS) as picture:
            if picture.format == "GIF":
                return _gif_extent(data, *picture.size)
            frames = getattr(picture, "n_frames", 1) if picture.format in MOVING else 1
            return frames, picture.width * picture.height
    except Exception:  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, TypeError, ...
        return 0, 0


def _gif_extent(data: bytes, width: int, height: int) -> tuple[int, int]:
    """Any frame may make the canvas larger. Pillow would take seconds to count many frames."""
    count = 0
    for right, bottom in _gif_corners(data):
        count, width, height = count + 1, max(width, right), max(height, bottom)
    return max(1, count), width * height


def _gif_corners(data: bytes) -> Iterator[tuple[int, int]]:
    """The right and bottom edge of each frame. Blocks are stepped over, not read."""
    try:
        at = 13 + _table_size(data[10])
        while data[at] != ord(";"):
            if data[at] == ord(","):  # a frame: left, top, width, height, flags
                left, top, width, height = (int.from_bytes(data[at + n : at + n + 2], "little") for n in (1, 3, 5, 7))
                yield left + width, top + height
                at = _after(data, at + 11 + _table_size(data[at + 9]))
            else:  # an extension, or a byte that means nothing
                at = _after(data, at + 2) if data[at] == ord("!") else at + 1
    except IndexError:  # cut short
        return


def _table_size(flags: int) -> int:
    """Bytes of a table of colours, if there is one."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _after(data: bytes, at: int) -> int:
    """Where a row of blocks ends, of which each begins with its length."""
    while data[at]:
        at += data[at] + 1
    return at + 1


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Numbers by their size, the rest by the alphabet."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
