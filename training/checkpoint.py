"""Checkpoints: all that a run needs to go on as if it had never stopped. safetensors and JSON; never pickle.

    checkpoints/step-00000200/state.safetensors   weights, optimizer, averages, carried state, random states
                             /progress.json       position, sums for the log, best score, stopper, schedule
                             /SHA256SUMS          of both, as `sha256sum --check` reads it

A checkpoint is written under a temporary name, flushed to the disk, and renamed, so it is whole or absent. The last
two are kept: if the newest is damaged, the one before it serves. One of after the step's validation has a name of its
own, `step-00000200-validated`: a whole checkpoint never has to go before the next one is there.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from seqmodels.errors import CheckpointError

CHECKPOINTS = "checkpoints"  # where a run keeps them
TENSORS, PROGRESS, SUMS = "state.safetensors", "progress.json", "SHA256SUMS"
AFTER_VALIDATION = "-validated"
KEPT = 2


@dataclass
class Progress:
    """Where a run stands, as plain numbers."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    step: int = 0  # updates tried so far, skipped ones included
    validated_step: int | None = None
    best_score: float | None = None
    best_nll: float = 0.0
    best_step: int | None = None
    validations_without_better: int = 0
    plateau_scale: float = 1.0
    plateau_wait: int = 0
    kept: list[tuple[float, int]] = field(default_factory=list)  # score and step of models to average at the end
    skipped: int = 0
    skipped_in_a_row: int = 0
    averaged: int = 0  # updates in the moving average of the weights
    loss_scale: float = 1.0  # of float16, and how many updates have gone well with it
    scaled_well: int = 0
    # Since the last line of the log:
    loss: float = 0.0
    nll: float = 0.0
    num_targets: int = 0
    updates: int = 0
    clipped: int = 0
    # Where the log ends, and how long it took. The clock is not part of what must be equal.
    log_bytes: int = 0
    seconds: float = 0.0


_PROGRESS = TypeAdapter(Progress)
Found = tuple[Progress, dict[str, Tensor], list[str]]  # a checkpoint, and a warning for each that was passed over


def save(directory: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write one checkpoint, then remove those that are no longer needed."""
    final, temporary = directory / _name(progress), directory / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
    (temporary / PROGRESS).write_bytes(_PROGRESS.dump_json(progress, indent=1))
    (temporary / SUMS).write_text(_sums(temporary), encoding="ascii")
    for name in (TENSORS, PROGRESS, SUMS):
        flush(temporary / name)
    flush(temporary)
    temporary.rename(final)
    flush(directory)
    flush(directory.parent)
    for old in saved_checkpoints(directory)[:-KEPT]:
        shutil.rmtree(old)


def forget_later(directory: Path, progress: Progress) -> None:
    """Remove the damaged checkpoints that were passed over on the way back to this one: they would count among those
    that are kept, and stand where the run is to be saved."""
    for path in saved_checkpoints(directory):
        if path.name > _name(progress):
            shutil.rmtree(path)


def load_newest(directory: Path) -> Found | None:
    """The newest whole checkpoint; None where there is none. Raises CheckpointError where there are some, but all are
    damaged.
    """
    found = saved_checkpoints(directory)
    warnings: list[str] = []
    for path in reversed(found):
        try:
            progress, tensors = _load(path)
        except CheckpointError as error:
            warnings.append(f"checkpoint {path.name} is damaged ({error}); going back to the one before it")
            continue
        return progress, tensors, warnings
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {directory} are damaged; remove that folder, and training begins anew"
        )
    return None


def read_progress(directory: Path) -> list[Progress]:
    """Where the run stood at each checkpoint that it may have to go on from."""
    found = []
    for path in saved_checkpoints(directory):
        try:
            found.append(_PROGRESS.validate_json((path / PROGRESS).read_bytes()))
        except (OSError, ValidationError):  # damaged, so never to be loaded
            continue
    return found


def saved_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(directory.glob("step-*"))


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(directory: Path) -> None:
    """`flush` a folder with all that is in it, and the two that it stands in."""
    for path in (*directory.rglob("*"), directory, *directory.parents[:2]):
        flush(path)


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is never seen half written: it gets its name when it is on the disk."""
    temporary = path.with_name(f".{path.name}.writing")
    yield temporary
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text that is never seen half written."""
    with writing_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, named `optimizer.<number of the parameter>.<name>`."""
    states = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": value
        for number, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`, into a fresh optimizer over the same parameters."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def pack_random_states() -> dict[str, Tensor]:
    """torch's generators. Data order is a pure function of the seed, and no other generator is used."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def unpack_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _load(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    try:
        if (path / SUMS).read_bytes() != _sums(path).encode("ascii"):
            raise CheckpointError("its files do not match their checksums")
        progress = _PROGRESS.validate_json((path / PROGRESS).read_bytes())
        if path.name.removesuffix(AFTER_VALIDATION) != f"step-{progress.step:08d}":  # earlier versions had no suffix
            raise CheckpointError(f"it is of step {progress.step}")
        return progress, load_file(path / TENSORS)
    except OSError as error:
        raise CheckpointError(f"{Path(str(error.filename)).name} cannot be read") from None
    except (ValueError, ValidationError, SafetensorError):
        raise CheckpointError("a file is malformed") from None


def _name(progress: Progress) -> str:
    return f"step-{progress.step:08d}{AFTER_VALIDATION if progress.validated_step == progress.step else ''}"


def _sums(path: Path) -> str:
    return "".join(f"{sha256(path / name)}  {name}\n" for name in (TENSORS, PROGRESS))
