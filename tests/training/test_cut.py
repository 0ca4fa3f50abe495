"""Cuts are seeded and keep duplicates together; the fingerprint sees every part."""

from training.data.cut import cut_rows
from training.data.rows import Row, fingerprint


def test_cuts_are_seeded_and_keep_duplicates_together() -> None:
    rows = [Row(f"Text {n // 2}" if n % 2 else f" text  {n // 2} ", "ab"[n % 2]) for n in range(200)]
    cut = cut_rows(rows, {"validation": 0.1, "test": 30}, seed=4, makes_text=False)
    assert len(cut["train"]) + len(cut["validation"]) + len(cut["test"]) == 200
    assert (len(cut["validation"]), len(cut["test"])) == (20, 30)
    keys = [{str(row.input).split()[1] for row in part} for part in cut.values()]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert cut == cut_rows(rows, {"validation": 0.1, "test": 30}, seed=4, makes_text=False)
    assert cut != cut_rows(rows, {"validation": 0.1, "test": 30}, seed=5, makes_text=False)


def test_pairs_linked_through_either_language_stay_together() -> None:
    chain = [Row("a", ("1",)), Row("a", ("2",)), Row("b", ("2",)), Row("b", ("3",))]
    others = [Row(f"x{n}", (f"y{n}",)) for n in range(20)]
    for seed in range(8):
        cut = cut_rows([*chain, *others], {"validation": 6}, seed, makes_text=True)
        assert len({name for name, part in cut.items() for row in part if row in chain}) == 1


def test_a_group_larger_than_a_split_is_trained_on() -> None:
    many = [Row(f"m{n}", ("the same",)) for n in range(60)]
    others = [Row(f"x{n}", (f"y{n}",)) for n in range(40)]
    for seed in range(20):
        cut = cut_rows([*many, *others], {"validation": 0.1, "test": 5}, seed, makes_text=True)
        assert (len(cut["validation"]), len(cut["test"]), len(cut["train"])) == (10, 5, 85)
        assert all(row in cut["train"] for row in many)
    pairs = [Row(f"{n // 2}", (f"y{n}",)) for n in range(8)]  # no group is as small as asked for: the smallest does
    assert len(cut_rows(pairs, {"validation": 1}, 1, makes_text=True)["validation"]) == 2


def test_rows_that_share_labels_are_no_duplicates() -> None:
    rows = [Row(f"x{n}", ("red", "blue") if n % 2 else ()) for n in range(20)]
    assert len(cut_rows(rows, {"validation": 5}, 1, makes_text=False)["validation"]) == 5


def test_the_fingerprint_sees_every_part() -> None:
    rows = [Row("a b", "x"), Row("c", "y")]
    prints = {
        fingerprint({"train": part})
        for part in (rows, rows[::-1], rows[:1], [Row("a", "x"), rows[1]], [Row("a b", "y"), rows[1]])
    }
    assert len(prints) == 5
