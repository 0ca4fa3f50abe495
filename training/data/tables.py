"""Tables of named columns, one for each split, from the hub, a local folder or a file.

Knows where files are and which split they belong to; knows no row and no token. `datasets` reads parquet, folders of
pictures and the hub; CSV, JSON and plain text are read in formats.py.
"""

import dataclasses
import glob
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from seqmodels.clips import SUFFIXES as PICTURE_SUFFIXES
from seqmodels.errors import DataError
from training.config import DataSection
from training.data.formats import not_utf8, read_csv, read_json, read_text, suffix_of

JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = {".txt", ".conll"}
TABLE_SUFFIXES = {".parquet", ".jsonl", ".ndjson", ".csv", ".tsv"}
PAPERS = {"license", "licence", "readme", "notice", "copying", "citation", "changelog"}  # texts that are no data
HALF_WRITTEN = ".train.jsonl.writing"  # what `training distill` has in a folder until it is whole
SPLIT_WORDS = {  # as `datasets` has them, for texts too
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


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
        return _read_texts(texts, task, {name for _, name in data.splits})
    if path.is_dir():
        if (path / HALF_WRITTEN).exists():
            raise DataError(f"data.path is {data.path!r}, which is half written; give its `distill` command again")
        return _load_folder(data, path)
    if (suffix := suffix_of(path)) in SEPARATORS:
        return {"train": read_csv([path], SEPARATORS[suffix])}
    if suffix in JSON_SUFFIXES:
        return {"train": read_json([path])}
    if path.suffix == ".parquet":
        return _load_with_datasets(data, "parquet", data_files={"train": glob.escape(str(path))})
    known = ", ".join(sorted({".parquet"} | JSON_SUFFIXES | SEPARATORS.keys() | TEXT_SUFFIXES))
    raise DataError(f"data.path is {data.path!r}, but files end in one of {known}")


def _read_texts(files: Sequence[Path], task: str, asked: Container[str]) -> dict[str, Table]:
    """By all of a file's name, where that is asked for, or else the split in it, as `datasets` names tables; several
    files of one split are one table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        split = file.stem if file.stem in asked else _split_named(file) or file.stem
        split = "train" if len(files) == 1 else split
        tables.setdefault(split, []).extend(read_text(file, task))
    return dict(tables)


def _split_named(path: Path) -> str | None:
    words = set(re.split(r"[-._ 0-9]+", path.stem.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & set(known)), None)


def _text_files(path: Path) -> list[Path]:
    """The file, or those of a folder: of .conll, if there are any. Beside tables a text is a note, and no data."""
    if path.is_file():
        return [path] if suffix_of(path) in TEXT_SUFFIXES else []
    entries = [entry for entry in sorted(path.iterdir()) if entry.name[0] != "."]
    texts = [entry for entry in entries if entry.is_file() and suffix_of(entry) in TEXT_SUFFIXES]
    texts = [text for text in texts if text.name.partition(".")[0].lower() not in PAPERS]
    others = [entry for entry in entries if entry not in texts]
    if any(TABLE_SUFFIXES & set(entry.suffixes) for entry in others if entry.is_file()):
        return []
    if not any(map(_split_named, texts)) and any(_holds_split(entry) for entry in others):
        return []
    return [text for text in texts if suffix_of(text) == ".conll"] or texts


def _holds_split(entry: Path) -> bool:
    """Whether it is named after one, and a .json, which may else describe what stands beside it, or a folder of tables
    or pictures."""
    if _split_named(entry) is None:
        return False
    if entry.is_file():
        return suffix_of(entry) == ".json"
    kinds = TABLE_SUFFIXES | {*PICTURE_SUFFIXES, ".json"}
    return any(kinds & {suffix.lower() for suffix in below.suffixes} for below in entry.rglob("*"))


def _library() -> Any:
    """`datasets`, which costs a second, and which generated data does without; without its remarks."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("huggingface_hub", "datasets"):  # every local README is asked for hub metadata
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is an error comes as an exception too
    return datasets


def _load_folder(data: DataSection, path: Path) -> dict[str, Table]:
    """Which file is of which split is for `datasets` to say, by their names or the folder's README."""
    if glob.escape(place := str(path.resolve())) != place:
        raise DataError(f"data.path is {place!r}, and `datasets` takes *, ? and [ for patterns; rename the folder")
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(str(path))
    except Exception as error:  # see _load_with_datasets
        raise _cannot_load(data, error) from None
    files = {str(split): [Path(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    suffixes = {suffix_of(file) for paths in files.values() for file in paths}
    if _asks_for_more(builder.config):
        return _load_with_datasets(data, str(path))
    features = builder.info.features  # where the README says what the columns are
    if suffixes <= SEPARATORS.keys():
        separator = getattr(builder.config, "sep", ",")
        return {name: _typed(data, read_csv(paths, separator), features) for name, paths in files.items()}
    if suffixes <= JSON_SUFFIXES:
        return {name: _typed(data, read_json(paths), features) for name, paths in files.items()}
    return _load_with_datasets(data, str(path))


def _asks_for_more(config: Any) -> bool:
    """Whether the folder's README says of the reading of its files what our own readers know nothing of."""
    known = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    fields = [field.name for field in dataclasses.fields(config) if field.name not in known]
    usual = type(config)()
    return any(getattr(config, name) != getattr(usual, name) for name in fields)


def _typed(data: DataSection, rows: list[dict[str, Any]], features: Mapping[str, Any] | None) -> Table:
    """The rows with the columns that are declared, of their types; as they are where none are."""
    if features is None or not rows:
        return rows
    library = _library()
    texts = {name for name, feature in features.items() if feature == library.Value("string")}

    def cell(name: str, value: Any) -> Any:
        if name in texts:
            return str(value) if isinstance(value, int | float) else value
        return value if value != "" else None

    try:
        table = library.Dataset.from_list([{name: cell(name, row.get(name)) for name in features} for row in rows])
        typed: Table = table.cast(features)
    except Exception as error:  # see _load_with_datasets
        raise _cannot_load(data, error) from None
    return typed


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
        reason = not_utf8(error)
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "it has no rows" if "corresponds to no data" in reason or reason == "StopIteration" else reason
    advice = "" if data.path else "; for a local copy set data.path=..."
    return DataError(f"{source_name(data)} cannot be loaded: {reason}{advice}")
