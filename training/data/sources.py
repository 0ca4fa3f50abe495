"""The splits that a run asks for: read from the hub, a local folder or file, or our own generators, or cut from train.

One code path: whatever the source, it becomes tables of named columns, then Rows, then splits.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn

from seqmodels.errors import DataError
from training.config import Recipe
from training.data.cut import cut_rows, cut_text
from training.data.generated import DATA_SETS, generate
from training.data.reader import RowReader, class_names
from training.data.rows import Row
from training.data.tables import read_tables, source_name

Say = Callable[[str], None]


class Splits:
    """The splits of a recipe's data, by their roles: train, validation, test."""

    def __init__(self, recipe: Recipe) -> None:
        """Reads the tables, but no row. Raises DataError."""
        self._recipe, data = recipe, recipe.data
        self._tables = {} if data.generated is not None else read_tables(data, recipe.task)
        self._found = {role: self._tables[name] for role, name in data.splits if name in self._tables}
        cuts = {"validation": data.cut.validation, "test": data.cut.test}
        wanted = {role: size for role, size in cuts.items() if size is not None}
        self._cuts = {role: size for role, size in wanted.items() if role not in self._found}
        self._unused_cuts = sorted(wanted.keys() - self._cuts.keys())

    def has(self, role: str) -> bool:
        """Whether there is such a split, or one is cut."""
        return self._recipe.data.generated is not None or role in self._found or role in self._cuts

    def is_cut(self, role: str) -> bool:
        """Whether the split depends on how the training split is cut."""
        return role in self._cuts or (role == "train" and bool(self._cuts))

    def rows(self, wanted: Sequence[str], say: Say = lambda _: None) -> dict[str, list[Row]]:
        """The wanted splits. say: is told about rows that are left out.

        Raises DataError where a split or a column is absent, or a row cannot be used.
        """
        data = self._recipe.data
        if data.generated is not None:
            return _generated(data.generated, wanted)
        for role in wanted:
            if role not in self._found and role not in self._cuts:
                self._refuse(role)
        from_train = any(self.is_cut(role) for role in wanted)
        if from_train and "train" not in self._found:
            self._refuse("train")
        read = {
            role: table for role, table in self._found.items() if role in wanted or (from_train and role == "train")
        }
        if "train" in wanted:
            for role in self._unused_cuts:
                say(f"the data has a {role} split of its own, so data.cut.{role} is not used")
        reader = RowReader(self._recipe, class_names(self._recipe, next(iter(read.values()))))
        rows = {role: reader.rows(role, table, say) for role, table in read.items()}
        if from_train:
            rows |= _cut(rows["train"], self._cuts, data.cut.seed, self._recipe.makes_text)
        return {role: rows[role] for role in wanted}

    def _refuse(self, role: str) -> NoReturn:
        data = self._recipe.data
        cut = f" to one of its splits, or cut one from train, before training, with data.cut.{role}=0.1"
        cut = "" if role == "train" else cut
        raise DataError(
            f"{source_name(data)} has no split {getattr(data.splits, role)!r} (it has {', '.join(self._tables)}); set "
            f"data.splits.{role}{cut}"
        )


def load_rows(
    recipe: Recipe, wanted: Sequence[str] = ("train", "validation"), say: Say = lambda _: None
) -> dict[str, list[Row]]:
    """The wanted splits, see `Splits.rows`."""
    return Splits(recipe).rows(wanted, say)


def _generated(name: str, wanted: Sequence[str]) -> dict[str, list[Row]]:
    if name not in DATA_SETS:
        raise DataError(f"data.generated is {name!r}; known: {', '.join(DATA_SETS)}")
    splits = generate(name)
    return {role: splits[role] for role in wanted}


def _cut(train: Sequence[Row], sizes: dict[str, float | int], seed: int, makes_text: bool) -> dict[str, list[Row]]:
    """Train less what is cut from it, and what is."""
    if len(train) == 1 and train[0].input is None:
        if len(train[0].references) == 1:
            return cut_text(train[0], sizes)
        train = [Row(None, (text,)) for text in train[0].references]
    return cut_rows(train, sizes, seed, makes_text)
