"""Clips: the picture files of a directory in their order, and how large an animated file is before any of it is drawn.

Knows names and headers; `preprocessing` draws. Imports Pillow only when called.
"""

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
MOVING = ("GIF", "WEBP", "PNG")  # of which a file may hold frames; further pictures in a JPEG are not of another time
GIF = (b"GIF87a", b"GIF89a")
FRAME = struct.Struct("<HHHHB")  # of a GIF: left, top, width, height, flags
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
        self._reads_left = _most_parts(data)

    def read(self, size: int | None = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise OSError("too many parts")
        return super().read(size)


def _most_parts(data: bytes) -> int:
    if data.startswith(b"BM"):  # a run of equal pixels is a part there, so whole files have many
        return len(data)
    return 20_000 + len(data) // 64


def extent(data: bytes) -> tuple[int, int]:
    """How many frames a file has, 1 if it is still, and how many pixels the largest of them; nothing is drawn. (0, 0)
    where it cannot be read: whoever draws it will say why."""
    from PIL import Image

    if data.startswith(GIF):
        return _gif_extent(data)
    try:
        with Image.open(PictureFile(data), formats=FORMATS) as picture:
            frames = getattr(picture, "n_frames", 1) if picture.format in MOVING else 1
            return max(1, frames - has_cover(picture)), picture.width * picture.height
    except Exception:  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, TypeError, ...
        return 0, 0


def has_cover(picture: Any) -> bool:
    """Whether an opened file begins with a picture that is no frame: an animated PNG may have one, for programs that
    show no animations."""
    return bool(getattr(picture, "default_image", False))


def _gif_extent(data: bytes) -> tuple[int, int]:
    """Without Pillow, which would make room for the first frame, 13,000 x 13,000 for all we know, and take seconds to
    count many. Any frame may make the canvas larger."""
    count, right, bottom = 0, int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    try:
        for left, top, width, height in _gif_frames(data):
            count, right, bottom = count + 1, max(right, left + width), max(bottom, top + height)
    except ValueError:
        return 0, 0
    return max(1, count), right * bottom


def _gif_frames(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Where each frame lies: left, top, width, height. Blocks are stepped over, not read. Raises ValueError where there
    are more than in any real file."""
    steps = iter(range(_most_parts(data)))
    try:
        at = 13 + _table_size(data[10])
        for _ in steps:
            if data[at] == ord(";"):
                return
            if data[at] == ord(","):
                left, top, width, height, flags = FRAME.unpack_from(data, at + 1)
                yield left, top, width, height
                at = _after(data, at + 11 + _table_size(flags), steps)
            else:  # an extension, or a byte that means nothing
                at = _after_extension(data, at, steps) if data[at] == ord("!") else at + 1
        raise ValueError("too many parts")
    except (IndexError, struct.error):  # cut short
        return


def _after_extension(data: bytes, at: int, steps: Iterator[int]) -> int:
    """Raises ValueError for an empty one, at which Pillow loses its place and would see other frames than we count."""
    label, length = data[at + 1], data[at + 2]
    repeats = label == 0xFF and data[at + 3 : at + 3 + length].startswith(b"NETSCAPE2.0")
    if (not length and label != 0xFE) or (repeats and not data[at + 3 + length]):
        raise ValueError("an empty extension")
    return _after(data, at + 2, steps)


def _table_size(flags: int) -> int:
    """Bytes of a table of colours, if there is one."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _after(data: bytes, at: int, steps: Iterator[int]) -> int:
    """Where a row of blocks ends, of which each begins with its length. steps: those that are left."""
    while data[at]:
        at += data[at] + 1
        if next(steps, None) is None:
            raise ValueError("too many parts")
    return at + 1


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Numbers by their size, the rest by the alphabet."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
