"""Tables of named columns, one for each split, from the hub, a local folder or a file.

Knows files and formats; knows no row and no token. CSV is read here rather than by `datasets`, which guesses: there
`NA` becomes nothing, `01` a number, and a field too many an index.
"""

import csv
import glob
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from seqmodels.errors import DataError
from training.config import DataSection

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = {".txt", ".conll"}
TABLE_SUFFIXES = {".parquet", ".jsonl", ".csv", ".tsv"}  # a .json may also describe what stands beside it
HALF_WRITTEN = ".train.jsonl.writing"  # what `training distill` has in a folder until it is whole

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document


class Table(Protocol):
    """What `datasets.Dataset` and our own lists have in common: a list of rows as mappings."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def source_name(data: DataSection) -> str:
    return f"data.path {data.path}" if data.path is not None else f"data set {data.id}"


def read_tables(data: DataSection, task: str) -> dict[str, Table]:
    """The splits by the names that the data set gives them; a single file is "train". Raises DataError."""
    if data.path is None:
        return _load_with_datasets(data, data.id, name=data.name, revision=data.revision)
    path = Path(data.path)
    if not path.exists():
        raise DataError(f"data.path is {data.path!r}, which does not exist; give a folder or a file")
    texts = _text_files(path)
    if texts:
        names = ["train"] if len(texts) == 1 else [file.stem for file in texts]
        return {name: _read_text(file, task) for name, file in zip(names, texts, strict=True)}
    if path.is_dir():
        if (path / HALF_WRITTEN).exists():
            raise DataError(f"data.path is {data.path!r}, which is half written; give its `distill` command again")
        return _load_folder(data, path)
    if path.suffix in SEPARATORS:
        return {"train": _read_csv([path], SEPARATORS[path.suffix])}
    if path.suffix not in BUILDERS:
        known = ", ".join(sorted(BUILDERS.keys() | SEPARATORS.keys() | TEXT_SUFFIXES))
        raise DataError(f"data.path is {data.path!r}, but files end in one of {known}")
    return _load_with_datasets(data, BUILDERS[path.suffix], data_files={"train": glob.escape(str(path))})


def _text_files(path: Path) -> list[Path]:
    """The file, or those of a folder. Beside tables a text is a licence or a note, and no data."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    if any(file.suffix in TABLE_SUFFIXES for file in files):
        return []
    return [file for file in files if file.suffix in TEXT_SUFFIXES]


def _library() -> Any:
    """`datasets`, which costs a second, and which generated data does without; without its remarks."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("huggingface_hub", "datasets"):  # every local README is asked for hub metadata
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is an error comes as an exception too
    return datasets


def _load_folder(data: DataSection, path: Path) -> dict[str, Table]:
    """Which file is of which split is for `datasets` to say, by their names or the folder's README."""
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(str(path))
    except Exception as error:  # see _load_with_datasets
        raise _cannot_load(data, error) from None
    files = {str(split): [Path(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    suffixes = {file.suffix for paths in files.values() for file in paths}
    if suffixes <= SEPARATORS.keys() and builder.info.features is None:  # else the README says what the columns are
        return {name: _read_csv(paths, getattr(builder.config, "sep", ",")) for name, paths in files.items()}
    return _load_with_datasets(data, str(path))


def _load_with_datasets(data: DataSection, *args: Any, **options: Any) -> dict[str, Table]:
    try:
        return dict(_library().load_dataset(*args, **options))
    except Exception as error:  # the library raises nearly everything, from OSError to bare Exception
        raise _cannot_load(data, error) from None


def _cannot_load(data: DataSection, error: BaseException) -> DataError:
    """What went wrong, from the bottom of the library's chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        reason = _not_utf8(error)
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "it has no rows" if "corresponds to no data" in reason or reason == "StopIteration" else reason
        reason += _bad_line(data)
    advice = "" if data.path else "; for a local copy set data.path=..."
    return DataError(f"{source_name(data)} cannot be loaded: {reason}{advice}")


def _bad_line(data: DataSection) -> str:
    """Where a file of JSON lines stops being one: the library counts only within a line."""
    path = Path(data.path or "")
    if path.suffix != ".jsonl" or not path.is_file():
        return ""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            json.loads(line.strip() or b"null")
        except (ValueError, RecursionError):
            return f", in line {number} of {path.name}"
    return ""


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it first"


# CSV


def _read_csv(paths: Sequence[Path], separator: str) -> Table:
    """The files' rows, one after another, every cell as the file spells it. Raises DataError."""
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    for path in paths:
        lines = _csv_lines(path, separator)
        header = next(lines, [])
        if not header:
            raise DataError(f"{path.name} is empty; its first line must name the columns")
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise DataError(f"{path.name}: the header has two columns {twice[0]!r}; rename one")
        if columns and header != columns:
            raise DataError(f"{path.name} has other columns than {paths[0].name}, of the same split; make them alike")
        columns = header
        rows += [_csv_row(path, columns, number, fields) for number, fields in enumerate(lines, start=1)]
    return rows


def _csv_row(path: Path, columns: Sequence[str], number: int, fields: list[str]) -> dict[str, str]:
    """Cells that are missing at a row's end are empty."""
    if len(fields) > len(columns):
        raise DataError(
            f"{path.name}: row {number} has {len(fields)} fields, but the header names {len(columns)} columns; put "
            "quotes around a field that holds the separator"
        )
    return dict(zip(columns, fields + [""] * (len(columns) - len(fields)), strict=True))


def _csv_lines(path: Path, separator: str) -> Iterator[list[str]]:
    """The fields of each line that is not empty, the header's first."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} cannot be loaded: {_not_utf8(error)}") from None
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    began = 1
    try:
        for fields in lines:
            if fields:
                yield fields
            began = lines.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise DataError(
            f"{path.name}: the row that begins in line {began}: {reason}; put quotes around the field and write those "
            "inside it twice"
        ) from None


# Plain text


def _read_text(path: Path, task: str) -> Table:
    """A running text for language models, or space-separated columns (column0, column1, ...) for taggers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} cannot be loaded: {_not_utf8(error)}") from None
    if task == "generate":
        return [{"text": text}]
    if task != "tag":
        raise DataError(f"{path.name}: plain text serves the tasks generate and tag; give CSV or JSON lines for {task}")
    return [_columns(block, path.name) for block in re.split(r"\n\s*\n", text) if block.strip()]


def _columns(block: str, name: str) -> dict[str, list[str]]:
    lines = [line.split() for line in block.splitlines() if line.strip()]
    if len({len(line) for line in lines}) != 1:
        raise DataError(f"{name}: the lines of a sentence differ in their number of columns, near {block[:40]!r}")
    return {f"column{number}": [line[number] for line in lines] for number in range(len(lines[0]))}
