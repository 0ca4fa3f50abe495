"""Cut missing splits from the training split: seeded, and aware of duplicates.

Rows that share an input, or one of several translations, form a group, and a group goes to one split as a whole: so
nothing that is tested was trained on.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

from seqmodels.errors import DataError
from training.data.rows import Row


def cut_rows(
    train: Sequence[Row], sizes: Mapping[str, float | int], seed: int, makes_text: bool
) -> dict[str, list[Row]]:
    """Splits of about the given sizes (a share below 1, or a number of rows), and the rest as "train".

    makes_text: whether targets are texts; else they are labels or numbers, which many rows share.
    """
    groups = _groups(train, makes_text)
    if len(groups) == 1:
        what = "inputs or one of the translations" if makes_text else "inputs"
        raise DataError(
            f"data.cut finds nothing to cut: the {len(train)} rows are all duplicates of each other, by their {what}; "
            "give more data, or a file of its own for each split"
        )
    random.Random(seed).shuffle(groups)
    cut: dict[str, list[int]] = {}
    for role, size in sizes.items():
        wanted = round(size * len(train)) if size < 1 else int(size)
        # A group that is larger than the split goes nowhere but to train, if there are others.
        fitting = [group for group in groups if len(group) <= wanted] or sorted(groups, key=len)[:1]
        cut[role], gone = [], set()
        while fitting and len(cut[role]) < wanted:
            cut[role] += (group := fitting.pop())
            gone.add(group[0])
        groups = [group for group in groups if group[0] not in gone]
    rest = sorted(index for group in groups for index in group)
    if not rest or not all(cut.values()):
        raise DataError(f"data.cut takes {dict(sizes)} of {len(train)} rows, which leaves a split empty; cut less")
    return {"train": [train[i] for i in rest], **{role: [train[i] for i in sorted(rows)] for role, rows in cut.items()}}


def cut_text(text: Row, sizes: Mapping[str, float | int]) -> dict[str, list[Row]]:
    """One running text: train is its beginning, the others follow in order. Sizes in characters."""
    whole = text.references[0]
    cut = {role: round(size * len(whole)) if size < 1 else int(size) for role, size in sizes.items()}
    end = len(whole) - sum(cut.values())
    if end <= 0:
        raise DataError(
            f"data.cut takes {dict(sizes)} of {len(whole)} characters, which leaves none to train on; cut less"
        )
    splits = {"train": [Row(None, (whole[:end],))]}
    for role, length in cut.items():
        splits[role] = [Row(None, (whole[end : end + length],))]
        end += length
    return splits


def _groups(rows: Sequence[Row], makes_text: bool) -> list[list[int]]:
    """Indices of rows that are linked by a shared key, directly or through others (union-find)."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[object, int] = {}
    for index, row in enumerate(rows):
        for key in _keys(row, makes_text):
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _keys(row: Row, makes_text: bool) -> Iterator[object]:
    if row.input is not None:
        yield "input", " ".join(row.input.casefold().split()) if isinstance(row.input, str) else row.input
    if makes_text and (row.input is None or isinstance(row.input, str)):
        for text in row.references:
            yield "target", " ".join(text.casefold().split())
