"""The splits that a run asks for: read from the hub, a local folder or file, or our own generators, or cut from train.

One code path: whatever the source, it becomes tables of named columns, then Rows, then splits.
"""

from collections.abc import Callable, Sequence

from seqmodels.errors import DataError
from training.config import CutSection, Recipe
from training.data.cut import cut_rows, cut_text
from training.data.generated import DATA_SETS, generate
from training.data.reader import RowReader, class_names
from training.data.rows import Row
from training.data.tables import read_tables, source_name

Say = Callable[[str], None]


def load_rows(
    recipe: Recipe, wanted: Sequence[str] = ("train", "validation"), say: Say = lambda _: None
) -> dict[str, list[Row]]:
    """The wanted splits. say: is told about rows that are left out.

    Raises DataError where a split or a column is absent, or a row cannot be used.
    """
    data = recipe.data
    if data.generated is not None:
        return _generated(data.generated, wanted)
    tables = read_tables(data, recipe.task)
    found = {role: tables[name] for role, name in data.splits if name in tables}
    cuts = {role: size for role, size in _sizes(data.cut).items() if role not in found}
    has = f"{source_name(data)} has no split {{!r}} (it has {', '.join(tables)}); set data.splits."
    for role in wanted:
        if role not in found and role not in cuts:
            advice = "" if role == "train" else f" to one of its splits, or cut one from train with data.cut.{role}=0.1"
            raise DataError(f"{has.format(getattr(data.splits, role))}{role}{advice}")
    needed = [role for role in found if role in wanted or (role == "train" and cuts.keys() & set(wanted))]
    if cuts.keys() & set(wanted) and "train" not in found:
        raise DataError(f"{has.format(data.splits.train)}train")
    reader = RowReader(recipe, class_names(recipe, found.get("train", found[needed[0]])))
    rows = {role: reader.rows(role, found[role], say) for role in needed}
    if cuts and "train" in rows:
        rows |= _cut(rows["train"], cuts, data.cut.seed)
    return {role: rows[role] for role in wanted}


def _generated(name: str, wanted: Sequence[str]) -> dict[str, list[Row]]:
    if name not in DATA_SETS:
        raise DataError(f"data.generated is {name!r}; known: {', '.join(DATA_SETS)}")
    splits = generate(name)
    return {role: splits[role] for role in wanted}


def _sizes(cut: CutSection) -> dict[str, float | int]:
    return {role: size for role, size in (("validation", cut.validation), ("test", cut.test)) if size is not None}


def _cut(train: Sequence[Row], sizes: dict[str, float | int], seed: int) -> dict[str, list[Row]]:
    """Train less what is cut from it, and what is."""
    if len(train) == 1 and train[0].input is None:
        return cut_text(train[0], sizes)
    return cut_rows(train, sizes, seed)
