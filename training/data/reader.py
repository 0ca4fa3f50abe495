"""RowReader: the columns of a table -> Rows. What is wrong with a row comes to light here, by split, row and column.

Knows columns, words, labels, pictures and numbers; knows no file and no token.
"""

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from seqmodels.clips import frame_files, is_directory
from seqmodels.errors import DataError, InputError
from seqmodels.reading import LARGEST_FEATURE
from training.config import Facts, Recipe
from training.data.pictures import preprocessor_for
from training.data.rows import Input, Row
from training.data.tables import Table, source_name

IGNORED = -100  # what other libraries' data has in place of a label; as one of ours it would be learned
LARGEST_TARGET = 1e12  # of a regression; the square of it still fits float32
LABEL_IT = (
    "label it or remove it; where no row of the split has a label, name another in data.splits, or cut one with "
    "data.cut"
)
CLIP = "a list of pictures, or the path of a directory of them, or one animated file as bytes or by its path"
WITHOUT_LISTS = "in a CSV write them separated by spaces; lists need JSON lines or parquet"


def class_names(recipe: Recipe, table: Table) -> tuple[str, ...]:
    """The names that the data set itself gives to its class numbers, if any."""
    assert recipe.data.columns is not None
    feature = getattr(table, "features", {}).get(recipe.data.columns.targets[0])
    feature = getattr(feature, "feature", feature)  # of the items, where the column holds lists
    names = tuple(getattr(feature, "names", None) or ())
    if names and recipe.data.label_names:
        raise DataError(
            f"{source_name(recipe.data)} names its classes itself ({_names(names[:5])}); remove data.label_names"
        )
    return names


class RowReader:
    """Turns the columns of one data set's tables into Rows."""

    def __init__(self, recipe: Recipe, declared_names: tuple[str, ...] = ()) -> None:
        """declared_names: of class numbers, by the data set; there -1 stands for "not labelled"."""
        assert recipe.data.columns is not None
        self.task, self.kind, self.problem_type = recipe.task, recipe.input, recipe.problem_type
        self.input_column, self.target_columns = recipe.data.columns.input, recipe.data.columns.targets
        self.class_names = declared_names or recipe.data.label_names
        self.unlabelled = -1 if declared_names else None
        self.source = source_name(recipe.data)
        self._preprocessor = preprocessor_for(recipe.model_config_with(Facts.unknown()))
        self._feature_size = 0  # of the first step read

    def rows(self, role: str, table: Table, say: Callable[[str], None]) -> list[Row]:
        """All rows that have an input and a target; rows with an empty one are left out, and `say` is told."""
        if not len(table):
            raise DataError(f"{self.source}: split {role} has no rows")
        wanted = [*([self.input_column] if self.input_column else []), *self.target_columns]
        for column in wanted:
            if column not in table[0]:
                raise DataError(
                    f"{self.source}: split {role} has no column {column!r} (it has {_names(table[0])}); "
                    "set data.columns"
                )
        rows = (self._row(f"split {role}, row {n}", fields) for n, fields in enumerate(_plain(table, wanted), start=1))
        without = self.problem_type == "multi_label_classification"  # a row of no label is an example too
        kept = [row for row in rows if (row.target or without) and (row.input or row.input is None)]
        if not kept:
            raise DataError(f"{self.source}: every row of split {role} is empty in {_names(wanted, ' or ')}")
        if len(kept) < len(table):
            empty = f"{len(table) - len(kept)} of {len(table)} rows"
            say(f"split {role}: left out {empty}, empty in {_names(wanted, ' or ')}")
        return kept

    def _row(self, where: str, fields: Mapping[str, Any]) -> Row:
        if self.input_column is None:
            given: Input = None
        else:
            given = self._input(f"{where}, column {self.input_column!r}", fields[self.input_column])
        targets = [(f"{where}, column {column!r}", fields[column]) for column in self.target_columns]
        if self.problem_type == "regression":
            return Row(given, tuple(self._number(place, value) for place, value in targets))
        if self.problem_type == "multi_label_classification":
            return Row(given, self._several(*targets[0]))
        if self.task == "classify":
            return Row(given, self._label(*targets[0]))
        if self.task == "tag":
            tags = self._tags(*targets[0])
            if given and not tags:
                self._refuse(targets[0][0], f"holds no tags, so it is unlabelled; {LABEL_IT}")
            if len(tags) != len(given or ()):
                self._refuse(targets[0][0], f"holds {len(tags)} tags for {len(given or ())} steps; give one for each")
            return Row(given, tags)
        return Row(given, tuple(text for place, value in targets for text in self._references(place, value)))

    # -- inputs; an empty cell is an empty input

    def _input(self, where: str, value: Any) -> Input:
        if value is None:
            return ""
        match self.kind:
            case "image":
                return self._picture(where, value)
            case "frames":
                return self._frames(where, value)
            case "features":
                return self._features(where, self._list(where, value, "steps, such as [[0.5, 1.0], [0.25, 2.0]]"))
        if self.task == "tag":
            return self._words(where, value)
        text = self._text(where, value)
        return text if text.strip() else ""

    def _list(self, where: str, value: Any, of: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(where, f"holds {_short(value)}, but must hold a list of {of}; give JSON lines or parquet")
        return value

    def _text(self, where: str, value: Any) -> str:
        """Numbers are texts too; lists, mappings and bytes are not."""
        if isinstance(value, list | Mapping | bytes):
            self._refuse(where, f"holds {_short(value)}, which is no text; name another column, or join the texts")
        return str(value)

    def _words(self, where: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            return self._split(where, value)
        for number, word in enumerate(value, start=1):
            if word is None or not self._text(where, word).strip():
                self._refuse(where, f"has nothing as word {number}; remove the word and its tag")
        return tuple(map(str, value))

    def _split(self, where: str, value: Any) -> tuple[str, ...]:
        """The words or tags of one string: at white space, as they are written in a CSV."""
        text = self._text(where, value)
        if _is_list(text):
            self._refuse(where, f"holds a list written as text, {_short(text)}; {WITHOUT_LISTS}")
        return tuple(text.split())

    def _features(self, where: str, value: list[Any]) -> tuple[tuple[float, ...], ...]:
        steps = [step if isinstance(step, list) else [step] for step in value]
        for number, step in enumerate(steps, start=1):
            if not all(_is_feature(x) for x in step):
                self._refuse(
                    where,
                    f"step {number} holds something that is no number within ±{LARGEST_FEATURE:,.0f}; fill what is "
                    "missing, scale what is larger",
                )
            self._feature_size = self._feature_size or len(step)
            if len(step) != self._feature_size or not step:
                self._refuse(
                    where, f"step {number} holds {len(step)} numbers, the steps before it {self._feature_size}"
                )
        return tuple(tuple(map(float, step)) for step in steps)

    def _frames(self, where: str, value: Any) -> tuple[bytes, ...]:
        """Each frame's file: of a list of pictures, of a directory of them, or of one animated file."""
        assert self._preprocessor is not None
        try:
            if isinstance(value, list):
                return tuple(self._picture(where, frame) for frame in value)
            if value == "":  # a cell of a CSV
                return ()
            if is_directory(value):
                return tuple(self._picture(where, str(path)) for path in frame_files(Path(value)))
            return tuple(self._preprocessor.split(self._file(where, value, f"a clip must be {CLIP}")))
        except InputError as error:
            self._refuse(where, str(error))

    def _picture(self, where: str, value: Any) -> bytes:
        """A broken one must not come to light in the middle of the training."""
        data = self._file(where, value, "a picture must be bytes or the path of a file")
        assert self._preprocessor is not None
        try:
            self._preprocessor.check(data)
        except InputError as error:
            self._refuse(where, str(error))
        return data

    def _file(self, where: str, value: Any, rule: str) -> bytes:
        """Its bytes: `datasets` stores a picture as bytes, or as the path of a file."""
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            path = value.get("path") if isinstance(value, Mapping) else value
            if not isinstance(path, str) or not Path(path).is_file():
                missing = f" (looked for in {Path.cwd()})" if isinstance(path, str) and not path.startswith("/") else ""
                self._refuse(where, f"holds {_short(path)}, but {rule}{missing}")
            data = Path(path).read_bytes()
        return data

    # -- targets

    def _references(self, where: str, value: Any) -> Iterator[str]:
        """The texts of a cell; blank ones count for language models alone, whose text may begin a paragraph so."""
        for item in value if isinstance(value, list) else [value]:
            text = "" if item is None else self._text(where, item)
            if text if self.task == "generate" else text.strip():
                yield text

    def _tags(self, where: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        return tuple(
            self._label(where, tag) for tag in (value if isinstance(value, list) else self._split(where, value))
        )

    def _several(self, where: str, value: Any) -> tuple[str, ...]:
        """The labels of a list, or of a text that holds them between spaces; each once."""
        if value is None:
            self._refuse(where, "holds nothing, so it is unlabelled; give an empty list where no label is right")
        return tuple(dict.fromkeys(self._tags(where, value)))

    def _number(self, where: str, value: Any) -> str:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST_TARGET:
            self._refuse(where, f"holds {_short(value)}, but must hold a number within ±{LARGEST_TARGET:,.0f}")
        return repr(number)

    def _label(self, where: str, value: Any) -> str:
        if value is None or value in (self.unlabelled, IGNORED) or (isinstance(value, str) and not value.strip()):
            self._refuse(
                where,
                f"holds {value!r}, so it is unlabelled; {LABEL_IT}",
            )
        if isinstance(value, list) and self.task == "classify" and self.problem_type == "single_label_classification":
            self._refuse(
                where, f"holds {_short(value)}; for several labels, model.problem_type=multi_label_classification"
            )
        label = self._text(where, value)
        if not self.class_names or (isinstance(value, str) and value in self.class_names):
            return label
        number = _whole_number(value)
        if number is None or not 0 <= number < len(self.class_names):
            names = _names(self.class_names)
            self._refuse(where, f"holds label {label}, which has no name in {names}; mend data.label_names")
        return self.class_names[number]

    def _refuse(self, where: str, what: str) -> NoReturn:
        raise DataError(f"{self.source}: {where} {what}")


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


def _is_list(text: str) -> bool:
    """Whether a text is a list as JSON or Python writes it. A sentence may well begin and end with brackets."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        items = ast.literal_eval(text)  # reads JSON's lists of strings and numbers too
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return len(items) > 1 or any(isinstance(item, str) for item in items)  # [1] may be a word


def _is_feature(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST_FEATURE


def _whole_number(value: Any) -> int | None:
    """The class number of 1, 1.0, "1" and "1.0" alike."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number.is_integer() else None


def _names(names: Mapping[str, Any] | Sequence[str], separator: str = ", ") -> str:
    """Those that hold blanks, or nothing, in quotes."""
    return separator.join(name if name.split() == [name] else repr(name) for name in names)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
