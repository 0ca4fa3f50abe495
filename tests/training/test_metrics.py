"""Each measure against a case worked out by hand."""

import math

import pytest

from training import metrics


def test_accuracy() -> None:
    assert metrics.accuracy(["a", "b", "a", "a"], ["a", "b", "b", "a"]) == 0.75


def test_macro_f1() -> None:
    # a: 2 right of 3 given and 2 there: 2·2/5 = 0.8.  b: 1 right of 1 given and 2 there: 2·1/3.
    assert metrics.macro_f1(["a", "b", "a", "a"], ["a", "b", "b", "a"]) == pytest.approx((0.8 + 2 / 3) / 2)


def test_span_f1_counts_whole_spans_only() -> None:
    expected = [["B-X", "I-X", "O", "B-Y"], ["B-X", "B-X", "O"]]
    predicted = [["B-X", "I-X", "O", "B-X"], ["B-X", "I-X", "O"]]
    # There: X0-2, Y3-4; X0-1, X1-2. Given: X0-2, X3-4; X0-2. Right: the first. 2·1 / (4 + 3)
    assert metrics.span_f1(predicted, expected) == pytest.approx(2 / 7)
    # X: 1 right of 3 given and 3 there; Y: never given
    third = pytest.approx(1 / 3)
    assert metrics.scores_by_kind(predicted, expected) == {
        "X": {"precision": third, "recall": third, "F1": third, "expected": 3},
        "Y": {"precision": 0, "recall": 0, "F1": 0, "expected": 1},
    }


def test_span_f1_reads_an_i_without_a_b_as_conlleval_does() -> None:
    assert metrics.span_f1([["I-X", "I-X", "I-Y"]], [["B-X", "I-X", "B-Y"]]) == 1.0
    assert metrics.span_f1([["O", "O"]], [["O", "O"]]) == 0.0


def test_bleu_by_hand() -> None:
    score, signature = metrics.bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    # n-grams right of given: 5/6, 3/5, 2/4, 1/3; equal lengths, so no brevity penalty
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:13a" in signature and "case:mixed" in signature


def test_bleu_penalises_brevity_and_takes_several_references() -> None:
    short, _ = metrics.bleu(["a b c d"], [["a b c d e f"]])
    assert short == pytest.approx(100 * math.exp(1 - 6 / 4))
    several, signature = metrics.bleu(["a b c d", "e f g h"], [["x y z w", "a b c d"], ["e f g h"]])
    assert several == pytest.approx(100.0)
    assert "nrefs" in signature


def test_bleu_lowercase() -> None:
    assert metrics.bleu(["A B C D"], [["a b c d"]])[0] == pytest.approx(0.0)
    assert metrics.bleu(["A B C D"], [["a b c d"]], lowercase=True)[0] == pytest.approx(100.0)


def test_chrf_of_equal_and_of_unlike_texts() -> None:
    assert metrics.chrf(["same text"], [["same text"]])[0] == pytest.approx(100.0)
    assert metrics.chrf(["aaa"], [["bbb"]])[0] == pytest.approx(0.0)


def test_chrf_by_hand() -> None:
    # "ab" against "ac", orders 1 and 2: precision = recall = 1/2 and 0; longer orders do not occur. Mean 1/4, F too.
    assert metrics.chrf(["ab"], [["ac"]])[0] == pytest.approx(25.0)


def test_exact_match() -> None:
    assert metrics.exact_match(["a b ", "c"], [["x", "a b"], ["d"]]) == 0.5


def test_perplexity_and_bits() -> None:
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(metrics.perplexity(1e6))
    assert metrics.bits_per_character(8 * math.log(2), 4) == pytest.approx(2)


def test_confusions_are_counted_by_what_was_expected() -> None:
    table = metrics.confusion(["a", "b", "a", "c"], ["a", "a", "a", "b"])
    assert table == {"a": {"a": 2, "b": 1}, "b": {"c": 1}}
