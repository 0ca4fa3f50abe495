"""Sequence-level distillation (Kim and Rush 2016): a teacher writes the targets that a smaller student learns from.

What a search writes is easier to learn than what people wrote: of all that could be said it says one thing, in one way.
The student is an ordinary run on the folder that is written here:

.distill.json              what it is made from; written first
.train.jsonl.writing       grows, and becomes train.jsonl when everything else is there
validation.jsonl, test.jsonl, README.md
"""

import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqmodels.config import Average, Strict, explain
from seqmodels.decoding.params import SearchParams
from seqmodels.ensemble import load_members
from seqmodels.errors import CheckpointError, ConfigError, DataError, InputError
from seqmodels.pipeline import Pipeline
from training.checkpoint import write_whole
from training.config import ColumnsSection, DataSection, Recipe
from training.data.rows import Row, fingerprint
from training.data.sources import Splits
from training.data.tables import HALF_WRITTEN
from training.parsing import differences
from training.reporter import SECONDS_BETWEEN_LINES
from training.screen import screen

BEGUN, TRAIN = ".distill.json", "train.jsonl"
COLUMNS = ColumnsSection(input="input", target="target")  # of generated data, which has no columns of its own
ROWS = 256  # answered, then written, at a time


class Begun(Strict):
    """What a folder must find unchanged when it is gone on with."""

    teacher: str  # its revision
    data: str  # fingerprint of all rows
    search: dict[str, Any]


def distill(
    directories: Sequence[Path],
    recipe: Recipe,
    output: Path,
    params: Mapping[str, Any],
    average: Average = "probability",
    console: Console | None = None,
) -> None:
    """Make a data set of the recipe's: targets of its training split are what the models in `directories` answer as
    one, other splits are as they are. Called again after an interruption, it goes on behind the last whole line.

    params: search parameters that go before the first model's own. Raises ConfigError where the models do not turn text
    into text, or `output` holds something else; CheckpointError where it was begun from something else; DataError.
    """
    if recipe.task != "translate":
        raise ConfigError(f"{directories[0]} is for task {recipe.task}; only translators, text to text, are distilled")
    if params.get("num_return_sequences", 1) > 1:
        raise ConfigError(
            "generation.num_return_sequences does nothing here: the best text alone is written; remove it"
        )
    console = console or screen()
    rows = _rows(recipe, console)
    teacher = _Teacher(directories, recipe.run.device, average, params)
    readable = [row for row in rows["train"] if teacher.reads(row)]
    if not readable:
        raise DataError("every row of the training split is longer than the teacher reads; give it other data")
    begun = Begun(teacher=teacher.pipeline.revision, data=fingerprint(rows), search=teacher.search)
    _begin(output, begun)
    if (output / TRAIN).is_file():
        console.print(f"{output} is finished; nothing to do", markup=False)
        return
    lines = _Lines.of(recipe, rows)
    with _appending(output / HALF_WRITTEN) as file:
        for batch in _batches(readable, _whole_lines(file), console):
            pairs = zip(batch, teacher.writes(batch), strict=True)
            file.write("".join(lines.line(row, [text]) for row, text in pairs).encode())
            file.flush()
            os.fsync(file.fileno())
        for role in rows.keys() - {"train"}:
            write_whole(output / f"{role}.jsonl", "".join(lines.line(row, row.references) for row in rows[role]))
        facts = {
            "Teacher": " ".join(path.name for path in directories) + (f" (mean {average})" if directories[1:] else ""),
            "Revision": begun.teacher,
            "Search": json.dumps(begun.search),
            "Rows": len(readable),
            "Rows left out, longer than the teacher reads": len(rows["train"]) - len(readable),
        }
        write_whole(output / "README.md", _card(output, recipe.data, facts))
        (output / HALF_WRITTEN).replace(output / TRAIN)
    console.print(f"wrote {output}; its README.md says how to train a student", markup=False)


def _rows(recipe: Recipe, console: Console) -> dict[str, list[Row]]:
    """Of all splits that there are; without validation a student could not be trained."""
    splits = Splits(recipe)
    roles = ["train", "validation", *(["test"] if splits.has("test") else [])]
    return splits.rows(roles, lambda text: console.print(text, markup=False))


class _Teacher:
    """One model, or several that answer as one, and how they search."""

    def __init__(self, directories: Sequence[Path], device: str, average: Average, params: Mapping[str, Any]) -> None:
        members = load_members(directories, device)
        self.pipeline = Pipeline(members, average=average)
        self._generation, self._params = members[0].generation, params

    @property
    def search(self) -> dict[str, Any]:
        return SearchParams.over(self._generation, self._params).model_dump(mode="json", exclude_defaults=True)

    def reads(self, row: Row) -> bool:
        try:
            self.pipeline.prepare(row.item, self._params)
        except InputError as error:
            if error.param != "inputs":
                raise
            return False
        return True

    def writes(self, rows: Sequence[Row]) -> list[str]:
        """Its answer to each, the one that it would give to it alone."""
        answers = self.pipeline.run([self.pipeline.prepare(row.item, self._params) for row in rows])
        return [answer["sequences"][0]["text"] for answer in answers]


def _begin(output: Path, begun: Begun) -> None:
    """Say in a new folder what it is made from; check it in one that was begun. Raises as above."""
    path = output / BEGUN
    if not path.is_file():
        if output.exists() and (not output.is_dir() or any(path.name[0] != "." for path in output.iterdir())):
            raise ConfigError(f"--output is {output}, which holds something else; name a new folder")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(path, begun.model_dump_json(indent=1) + "\n")
    try:
        was = Begun.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error)}; name another --output") from None
    for key, then, now in differences(was.model_dump(), begun.model_dump()):
        raise CheckpointError(f"{output} was begun with {key} {then}, and now it is {now}; name another --output")


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """The file, for one process at a time."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is writing {path.parent}; wait for it, or name another --output"
            ) from None
        yield file


def _whole_lines(file: BinaryIO) -> int:
    """How many it holds; what a kill has left of another is cut off."""
    file.seek(0)
    count = end = 0
    for line in file:
        if line.endswith(b"\n"):
            count, end = count + 1, end + len(line)
    file.truncate(end)
    return count


def _batches(rows: Sequence[Row], done: int, console: Console) -> Iterator[Sequence[Row]]:
    """Those that are not done yet, while the person watching sees how far it is."""
    columns = TextColumn("writing targets"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    began = shown = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(rows), completed=done)
        for first in range(done, len(rows), ROWS):
            yield rows[first : first + ROWS]
            last = min(first + ROWS, len(rows))
            bar.update(task, completed=last)
            if not console.is_terminal and (now := time.monotonic()) - shown > SECONDS_BETWEEN_LINES:
                shown, left = now, (now - began) / (last - done) * (len(rows) - last)
                console.print(f"{last}/{len(rows)} targets  {timedelta(seconds=round(left))} left")


@dataclass(frozen=True)
class _Lines:
    """Rows as JSON lines, in which a column is of one type throughout."""

    columns: ColumnsSection
    as_lists: bool  # where any row has several references

    @classmethod
    def of(cls, recipe: Recipe, rows: Mapping[str, Sequence[Row]]) -> "_Lines":
        columns = recipe.data.columns or COLUMNS
        several = any(len(row.references) > 1 for split in rows.values() for row in split)
        return cls(columns, several or len(columns.targets) > 1)

    def line(self, row: Row, targets: Sequence[str]) -> str:
        first, *others = self.columns.targets
        cells = {self.columns.input: row.input, first: list(targets) if self.as_lists else targets[0]}
        return json.dumps({**cells, **{name: [] for name in others}}, ensure_ascii=False) + "\n"


def _card(output: Path, data: DataSection, facts: Mapping[str, object]) -> str:
    overrides = [shlex.quote(f"data.path={output}")]
    if data.generated:
        overrides += ["data.generated=null", "'data.columns={input: input, target: target}'"]
    overrides += [f"data.splits.{role}={role}" for role, name in data.splits if name != role]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""# {output.name}

{data.origin}, with targets of the training split that a model has written
(sequence-level distillation, Kim and Rush 2016). Other splits are unchanged. Licence of the data: {data.license}.

| | |
| --- | --- |
{table}

A student is trained on it by any recipe for this data, with smaller sizes in `model`:

    python -m training train RECIPE.yaml {" ".join(overrides)}
"""
