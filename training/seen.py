"""Which pictures and clips a model was trained on, so that nobody scores it on them.

seen.safetensors   digests (N, 32) uint8, sha256 of each picture's file, or of each clip's frames one after another
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from seqmodels.errors import DataError
from training import checkpoint
from training.data.rows import Row

SEEN = "seen.safetensors"


def keep_seen(rows: Sequence[Row], directory: Path, before: Path | None = None) -> None:
    """Write down those of the training split, if it has any. before: a model with which the run begins, and whose
    pictures are then written down too."""
    (directory / SEEN).unlink(missing_ok=True)
    digests = {digest for row in rows if (digest := _digest(row))} | (_seen(before) if before else set())
    if digests:
        table = torch.frombuffer(bytearray(b"".join(sorted(digests))), dtype=torch.uint8).view(-1, 32)
        with checkpoint.writing_whole(directory / SEEN) as temporary:
            save_file({"digests": table}, temporary)


def copy_seen(directory: Path, to: Path) -> None:
    """For a model that was made of a run's."""
    if (directory / SEEN).is_file():
        shutil.copyfile(directory / SEEN, to / SEEN)


def refuse_seen(rows: Sequence[Row], split: str, directory: Path, say: Callable[[str], None]) -> None:
    """Raises DataError where one of the rows shows what the model of a directory was trained on, and where what tells
    that is damaged. say: is told where nothing tells it."""
    if any(row.pictures for row in rows) and not (directory / SEEN).is_file():
        say(f"warning: {directory} holds no {SEEN}, so nothing tells which pictures its model was trained on")
    if found := rows_seen(rows, directory):
        raise DataError(
            f"{directory} was trained on {len(found)} of the {len(rows)} inputs of the {split} split, the first in row "
            f"{found[0]}: scores would say nothing about new ones; remove them, name another split in "
            f"data.splits.{split}, or score what was trained on as that, with --split train"
        )


def rows_seen(rows: Sequence[Row], directory: Path) -> list[int]:
    """The numbers, from 1, of those that show what the model of a directory was, or is to be, trained on."""
    seen = _seen(directory)
    return [number for number, row in enumerate(rows, start=1) if _digest(row) in seen]


def _seen(directory: Path) -> set[bytes]:
    """Empty of a model that was trained on no pictures, or by an earlier version."""
    path = directory / SEEN
    if not path.is_file():
        return set()
    try:
        return set(map(bytes, load_file(path)["digests"].numpy()))
    except (OSError, SafetensorError, KeyError):
        raise DataError(
            f"{path} is damaged, so nothing tells which pictures the model was trained on; bring it back, or remove it "
            "if you know that none of them is scored"
        ) from None


def _digest(row: Row) -> bytes:
    """b"" of what shows nothing."""
    return hashlib.sha256(b"".join(row.pictures)).digest() if row.pictures else b""
