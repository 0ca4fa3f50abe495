"""Read a data set from the hub, a local folder or file, or our own generators, and hand it out as Rows.

One code path: whatever the source, it becomes tables of named columns, then splits, then Rows. Knows files and
columns; knows no token.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from seqmodels.errors import DataError
from training.config import DataSection, Recipe
from training.data.cut import cut_rows, cut_text
from training.data.generated import DATA_SETS, generate
from training.data.rows import Input, Row

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
TEXT_SUFFIXES = {".txt", ".conll"}


class Table(Protocol):
    """What `datasets.Dataset` and our own text files have in common: a list of rows as mappings."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def load_rows(recipe: Recipe, wanted: Sequence[str] = ("train", "validation")) -> dict[str, list[Row]]:
    """The wanted splits. Raises DataError where a split or a column is absent, or a split has no labels."""
    data = recipe.data
    if data.generated is not None:
        return _generated(data.generated, wanted)
    tables = _read_tables(data, recipe.task)
    found = {role: tables[name] for role, name in data.splits if name in tables}
    if "train" not in found:
        raise DataError(
            f"{_source(data)} has no split {data.splits.train!r} (it has {', '.join(tables)}); set data.splits.train"
        )
    reader = _RowReader(recipe, found["train"])
    whole = {role: reader.rows(role, found[role]) for role in found if role in wanted or role == "train"}
    rows = _with_cuts(data, whole, found)
    for role in wanted:
        if role not in rows:
            raise DataError(
                f"{_source(data)} has no split {getattr(data.splits, role)!r} (it has {', '.join(tables)}); set "
                f"data.splits.{role} to one of its splits, or cut one from train with data.cut.{role}=0.1"
            )
    return {role: rows[role] for role in wanted}


def _generated(name: str, wanted: Sequence[str]) -> dict[str, list[Row]]:
    if name not in DATA_SETS:
        raise DataError(f"data.generated is {name!r}; known: {', '.join(DATA_SETS)}")
    splits = generate(name)
    return {role: splits[role] for role in wanted}


def _with_cuts(data: DataSection, rows: dict[str, list[Row]], found: Mapping[str, Table]) -> dict[str, list[Row]]:
    """The given splits, and those that the source lacks and the recipe cuts from train."""
    sizes = {role: size for role, size in data.cut if role != "seed" and size is not None and role not in found}
    if not sizes:
        return rows
    train = rows["train"]
    if len(train) == 1 and train[0].input is None:
        return {**rows, **cut_text(train[0], sizes)}
    return {**rows, **cut_rows(train, sizes, data.cut.seed)}


def _source(data: DataSection) -> str:
    return f"data.path {data.path}" if data.path is not None else f"data set {data.id}"


# Tables


def _read_tables(data: DataSection, task: str) -> dict[str, Table]:
    if data.path is None:
        return _load_with_datasets(data, data.id, name=data.name, revision=data.revision)
    path = Path(data.path)
    if not path.exists():
        raise DataError(f"data.path is {data.path!r}, which does not exist; give a folder or a file")
    texts = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in TEXT_SUFFIXES)
    if texts and texts[0].suffix in TEXT_SUFFIXES:
        names = ["train"] if len(texts) == 1 else [file.stem for file in texts]
        return {name: _read_text(file, task) for name, file in zip(names, texts, strict=True)}
    if path.is_dir():
        return _load_with_datasets(data, str(path))
    if path.suffix not in BUILDERS:
        known = ", ".join(sorted(BUILDERS.keys() | TEXT_SUFFIXES))
        raise DataError(f"data.path is {data.path!r}, but files end in one of {known}")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return _load_with_datasets(data, BUILDERS[path.suffix], data_files={"train": str(path)}, **options)


def _load_with_datasets(data: DataSection, *args: Any, **options: Any) -> dict[str, Table]:
    import datasets  # costs a second, and generated data does without

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it asks every local README for hub metadata
    try:
        return dict(datasets.load_dataset(*args, **options))
    except Exception as error:  # the library raises nearly everything, from OSError to bare Exception
        advice = "" if data.path else "; for a local copy set data.path=..."
        raise DataError(f"{_source(data)} cannot be loaded: {_reason(error)}{advice}") from None


def _reason(error: BaseException) -> str:
    """What went wrong, from the bottom of the library's chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it first"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "it has no rows" if "corresponds to no data" in lines[0] else lines[0]


def _read_text(path: Path, task: str) -> Table:
    """A running text for language models, or space-separated columns (column0, column1, ...) for taggers."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8; convert it first") from None
    if task == "generate":
        return [{"text": text}]
    if task != "tag":
        raise DataError(f"{path.name}: plain text serves the tasks generate and tag; give CSV or JSON lines for {task}")
    return [_columns(block, path.name) for block in text.replace("\r\n", "\n").split("\n\n") if block.strip()]


def _columns(block: str, name: str) -> dict[str, list[str]]:
    lines = [line.split() for line in block.splitlines() if line.strip()]
    if len({len(line) for line in lines}) != 1:
        raise DataError(f"{name}: the lines of a sentence differ in their number of columns, near {block[:40]!r}")
    return {f"column{number}": [line[number] for line in lines] for number in range(len(lines[0]))}


# Rows


class _RowReader:
    """Turns the columns of a table into Rows."""

    def __init__(self, recipe: Recipe, train: Table) -> None:
        assert recipe.data.columns is not None
        self.task, self.kind = recipe.task, recipe.input
        self.input_column = recipe.data.columns.input
        target = recipe.data.columns.target
        self.target_columns = (target,) if isinstance(target, str) else target
        self.class_names = _class_names(train, self.target_columns[0]) or recipe.data.label_names
        self.source = _source(recipe.data)

    def rows(self, role: str, table: Table) -> list[Row]:
        """All rows that have an input and a target; rows with an empty one are left out."""
        if not len(table):
            raise DataError(f"{self.source}: split {role} has no rows")
        wanted = [*([self.input_column] if self.input_column else []), *self.target_columns]
        for column in wanted:
            if column not in table[0]:
                raise DataError(
                    f"{self.source}: split {role} has no column {column!r} (it has {', '.join(table[0])}); "
                    "set data.columns"
                )
        rows = (self._row(f"split {role}, row {n}", fields) for n, fields in enumerate(_plain(table, wanted), start=1))
        kept = [row for row in rows if row.target and (row.input or row.input is None)]
        if not kept:
            raise DataError(f"{self.source}: every row of split {role} has an empty input or target")
        return kept

    def _row(self, where: str, fields: Mapping[str, Any]) -> Row:
        value = fields[self.input_column] if self.input_column else None
        targets = [fields[column] for column in self.target_columns]
        if self.task == "classify":
            return Row(self._input(value), self._label(where, targets[0]))
        if self.task == "tag":
            tags = tuple(self._label(where, tag) for tag in targets[0] or ())
            row = Row(self._input(value), tags)
            if len(tags) != len(row.input or ()):
                raise DataError(f"{self.source}: {where} has {len(row.input or ())} steps but {len(tags)} tags")
            return row
        texts = [text for target in targets for text in (target if isinstance(target, list) else [target])]
        return Row(self._input(value), tuple(str(text) for text in texts if text))

    def _input(self, value: Any) -> Input:
        if value is None:
            return None if self.kind == "nothing" else ""
        if self.kind == "image":
            return _picture(value)
        if self.kind == "frames":
            return tuple(_picture(frame) for frame in value)
        if self.kind == "features":
            return tuple(tuple(map(float, step)) if isinstance(step, list) else (float(step),) for step in value)
        if self.task != "tag":
            return str(value)
        return tuple(value.split(" ")) if isinstance(value, str) else tuple(map(str, value))

    def _label(self, where: str, value: Any) -> str:
        if value is None or value == -1 or value == "":
            raise DataError(
                f"{self.source}: {where} is unlabelled ({self.target_columns[0]} is {value!r}); label it or remove it; "
                "where no row of the split has a label, name another in data.splits, or cut one with data.cut"
            )
        if isinstance(value, int) and self.class_names:
            if not 0 <= value < len(self.class_names):
                raise DataError(
                    f"{self.source}: label {value} has no name in {', '.join(self.class_names)}; mend data.label_names"
                )
            return self.class_names[value]
        return str(value)


def _plain(table: Table, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The rows with the given columns only, pictures as they are stored, not decoded."""
    if isinstance(table, list):
        yield from table
        return
    import datasets

    assert isinstance(table, datasets.Dataset)
    picked = table.select_columns(list(dict.fromkeys(columns)))
    for name, feature in picked.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            picked = picked.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            picked = picked.cast_column(name, datasets.List(datasets.Image(decode=False)))
    yield from picked


def _class_names(table: Table, column: str) -> tuple[str, ...]:
    """The names that the data set itself gives to its class numbers, if any."""
    feature = getattr(table, "features", {}).get(column)
    feature = getattr(feature, "feature", feature)  # of the items, where the column holds lists
    return tuple(getattr(feature, "names", None) or ())


def _picture(value: Any) -> bytes:
    """The file's bytes: `datasets` stores a picture as bytes, or as the path of a file."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping) and value.get("bytes"):
        return bytes(value["bytes"])
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not Path(path).is_file():
        raise DataError(f"a picture must be bytes or the path of a file, not {str(path)[:60]!r}")
    return Path(path).read_bytes()
