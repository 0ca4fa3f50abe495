"""Whose turn it is."""

import random
from dataclasses import dataclass

import pytest

from seqmodels.decoding.waiting import Waiting


@dataclass(frozen=True)
class One:
    id: str
    priority: int = 0
    client: str = ""
    deadline: float | None = None


def order(requests: list[One], rows: dict[str, int] | None = None, width: int = 1) -> str:
    """The ids in the order in which they are taken, each filling `width` rows of its client for good."""
    waiting: Waiting[One] = Waiting()
    for request in requests:
        waiting.add(request)
    rows, taken = dict(rows or {}), ""
    while request := waiting.head(rows):
        waiting.take(request)
        rows[request.client] = rows.get(request.client, 0) + width
        taken += request.id
    assert len(waiting) == 0
    return taken


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([One("a"), One("b"), One("c")], "abc"),
        ([One("a", deadline=9.0), One("b", deadline=3.0), One("c")], "bac"),
        ([One("a"), One("b", priority=2), One("c", priority=1)], "bca"),
        ([One("a", client="x"), One("b", client="x"), One("c", client="x"), One("d", client="y")], "adbc"),
        ([One("a", client="x"), One("b", client="y", priority=-1), One("c", client="x")], "acb"),
    ],
)
def test_turns(requests: list[One], expected: str) -> None:
    assert order(requests) == expected


def test_a_client_with_rows_in_use_waits_for_one_without() -> None:
    assert order([One("a", client="x"), One("b", client="y")], rows={"x": 4}) == "ba"


def test_expired_and_removed_are_gone() -> None:
    choose = random.Random(0)
    for _ in range(200):
        requests = [
            One(str(i), choose.randrange(2), choose.choice("xy"), choose.choice([None, 1.0, 2.0, 3.0]))
            for i in range(9)
        ]
        waiting: Waiting[One] = Waiting()
        for request in requests:
            waiting.add(request)
        gone = {r.id for r in waiting.expired(2.0)}
        assert gone == {r.id for r in requests if r.deadline is not None and r.deadline <= 2.0}
        removed = str(choose.randrange(9))
        waiting.remove(removed)
        left = [r for r in requests if r.id not in gone | {removed}]
        assert len(waiting) == len(left)
        taken = []
        while request := waiting.head({}):
            waiting.take(request)
            taken.append(request.id)
        assert sorted(taken) == sorted(r.id for r in left)
