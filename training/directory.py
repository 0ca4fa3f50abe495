"""The directory of a run: what stands in it before step 0, and whether a run may go on there.

recipe.yaml, run.json      what is trained on what; written before step 0, never changed
tokenizer.json, ...        trained from the training split, before step 0
begin.safetensors          word vectors, a backbone that others have trained, where the recipe names any; before step 0
seen.safetensors           which pictures are trained on; before step 0
encoded.safetensors        the training split as numbers, where it is text; until the run is finished
checkpoints/, validated/   to go on from; the best model so far
metrics.jsonl, timings.jsonl, tensorboard/
config.json, model.safetensors, README.md, report.html, finished.json      at the end: a model directory
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError

from seqmodels.config import ModelConfig, Strict, explain
from seqmodels.errors import CheckpointError, ConfigError
from seqmodels.pretrained import CARD, RECIPE, SOURCE_TOKENIZER, TARGET_TOKENIZER, TOKENIZER, tokenizer_names
from seqmodels.tokenizer import Tokenizer
from training import checkpoint
from training.config import DataSection, Recipe
from training.data.examples import Codec
from training.parsing import differences, parse_recipe

RUN, FINISHED = "run.json", "finished.json"
OF_ITS_END = (CARD, "report.html", "snapshots", "validated")
MAY_CHANGE = ("run.max_minutes",)  # when a run ends by the clock changes nothing before


class RunFile(Strict):
    """run.json: what a run must find unchanged when it goes on."""

    recipe: dict[str, Any]
    data: str  # fingerprint of the training and validation rows
    model: ModelConfig  # what the recipe and the data, or the model that it begins from, came to
    tokenizers: tuple[str | None, str | None]  # fingerprints of the source's and the target's
    torch: str
    threads: PositiveInt

    @property
    def data_section(self) -> DataSection:
        """The recipe's, with the defaults of the fields that have come since. Raises CheckpointError."""
        try:
            return DataSection.model_validate_json(json.dumps(self.recipe["data"]))
        except ValidationError as error:
            raise CheckpointError(f"the data of {RUN}: {explain(error)}; it is of another version") from None


@contextmanager
def refusals(directory: Path) -> Iterator[None]:
    """A disk that is full, or may only be read, ends a run; what was saved before is whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # safetensors writes by itself
        raise CheckpointError(
            f"{directory} could not be written to ({reason}). Mend that, such as by making room, and give the same "
            "command again: what was saved before is kept"
        ) from error


@contextmanager
def locked(directory: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Two runs in one directory would ruin each other. The lock goes with the process, however it ends."""
    deadline = time.monotonic() + wait_s
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"run.output_dir is {str(directory)!r}, where no directory can be written: {error.strerror}; name another"
        ) from None
    with lock as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"another process is training in {directory}; wait for it, or set run.output_dir"
                    ) from None
            time.sleep(0.1)
        yield


def saved_run(directory: Path, recipe: Recipe) -> RunFile | None:
    """What an earlier call left, if it is of the same recipe; None where it came to nothing, so that this one begins.

    Raises CheckpointError where a run of another recipe is under way.
    """
    saved = read_run(directory)
    if saved is None:
        if (directory / "config.json").exists():
            raise ConfigError(f"run.output_dir {directory} holds a model that no run made; name another directory")
        if (foreign := _not_of_a_run(directory, recipe)) is not None:
            raise ConfigError(
                f"run.output_dir {directory} holds {foreign}, which no run made and this one would write over; name "
                "another directory"
            )
        return None
    changed = [one for one in differences(_completed(saved.recipe), _plain(recipe)) if one[0] not in MAY_CHANGE]
    if changed and not is_under_way(directory):
        return None
    for key, was, now in changed:
        raise CheckpointError(
            f"{directory} was begun with {key}={was}, but the recipe now says {now}; put it back, or name another "
            "run.output_dir"
        )
    return saved


def _not_of_a_run(directory: Path, recipe: Recipe) -> str | None:
    """A file or folder of a name that a run gives, where there is no run: those of its end, and a recipe that is not
    what a beginning that came to nothing has left."""
    for name in OF_ITS_END:
        if (directory / name).exists():
            return name
    path = directory / RECIPE
    left = path.is_file() and path.read_bytes() == as_yaml(recipe.model_dump(mode="json")).encode()
    return RECIPE if path.exists() and not left else None


def is_under_way(directory: Path) -> bool:
    """Whether a run has saved anything of its training that another beginning would lose."""
    return (directory / FINISHED).is_file() or bool(checkpoint.saved_checkpoints(directory / checkpoint.CHECKPOINTS))


def read_run(directory: Path) -> RunFile | None:
    path = directory / RUN
    if not path.is_file():
        return None
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error)}; remove the directory to start again") from None


def readable_run(directory: Path) -> RunFile | None:
    """None also for one that cannot be read, such as another version's: the model itself can be used all the same."""
    try:
        return read_run(directory)
    except CheckpointError:
        return None


def write_run(directory: Path, recipe: Recipe, codec: Codec, data: str) -> None:
    """All files of before step 0; run.json last, since it says that the others are there. Those of an earlier beginning
    that came to nothing go first."""
    for stale in (TOKENIZER, SOURCE_TOKENIZER, TARGET_TOKENIZER):
        (directory / stale).unlink(missing_ok=True)
    shutil.rmtree(directory / "snapshots", ignore_errors=True)
    tokenizers = (codec.source_tokenizer, codec.target_tokenizer)
    for name, tokenizer in zip(tokenizer_names(codec.config), tokenizers, strict=True):
        if name and tokenizer:
            with checkpoint.writing_whole(directory / name) as temporary:
                tokenizer.save(temporary)
    checkpoint.write_whole(directory / RECIPE, as_yaml(recipe.model_dump(mode="json")))
    file = RunFile(
        recipe=_plain(recipe),
        data=data,
        model=codec.config,
        tokenizers=(_digest(codec.source_tokenizer), _digest(codec.target_tokenizer)),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    checkpoint.write_whole(directory / RUN, file.model_dump_json(indent=2) + "\n")


def as_yaml(fields: dict[str, Any]) -> str:
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def read_tokenizers(directory: Path, saved: RunFile) -> list[Tokenizer | None]:
    """The source's and the target's. Raises CheckpointError where one is not that of step 0."""
    names = tokenizer_names(saved.model)
    found = [Tokenizer.load(directory / name) if name and (directory / name).is_file() else None for name in names]
    for name, tokenizer, digest in zip(names, found, saved.tokenizers, strict=True):
        if _digest(tokenizer) != digest:
            raise CheckpointError(f"{directory / str(name)} is not the tokenizer that the run began with; put it back")
    return found


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return tokenizer.fingerprint if tokenizer else None


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version, with the defaults of the fields that have come since."""
    try:
        return _plain(parse_recipe(saved))
    except ConfigError:  # then the differences tell
        return saved


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, less where it is kept: a run directory may be moved."""
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    del fields["run"]["output_dir"]
    return fields
