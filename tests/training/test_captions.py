"""The captioning measures by hand."""

import json
import math
from pathlib import Path

import pytest

from tests.training.recipes import recipe
from training.captions import Cider, bleu, cider, cider_d, rouge_l, tokens
from training.run import train


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs .", "a dog runs"),
        ('The "best" t-shirt, she said; (really)!', "the best t-shirt she said really"),
        ("The dog's ball isn't 3.5 m away...", "the dog 's ball is n't 3.5 m away"),
        ("They’re in   New York\n", "they 're in new york"),
        ("ein Mädchen – größer", "ein mädchen größer"),
        (" . ", ""),
    ],
)
def test_tokens(text: str, expected: str) -> None:
    assert tokens(text) == expected.split()


def bleu_of(candidate: str, *references: str) -> list[float]:
    return bleu([candidate.split()], [[one.split() for one in references]])


def test_bleu_of_the_papers_examples() -> None:
    """Papineni et al. 2002: a word counts as often as it stands in one reference."""
    assert bleu_of("the the the the the the the", "the cat is on the mat", "there is a cat on the mat")[
        0
    ] == pytest.approx(100 * 2 / 7)


def test_bleu_takes_all_orders_and_the_nearest_length() -> None:
    right, given = (4, 3, 2, 1), (5, 4, 3, 2)  # of "a b c d x" against "a b c d y z": 5 words are nearest to 4, then 6
    scores = bleu_of("a b c d x", "a b c d y z", "q r s t")
    for order in range(1, 5):
        product = math.prod(r / g for r, g in zip(right[:order], given[:order], strict=True))
        assert scores[order - 1] == pytest.approx(100 * product ** (1 / order))  # no penalty: 4 is nearer than 6
    assert bleu_of("a b c d", "a b c d e f")[3] == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert bleu_of("", "a b")[3] == 0


def test_bleu_is_of_the_corpus() -> None:
    candidates, references = [["a", "b"], ["c"]], [[["a", "b"]], [["x"]]]
    assert bleu(candidates, references)[0] == pytest.approx(100 * 2 / 3)


def test_rouge_l() -> None:
    """Lin 2004: "police kill the gunman" shares three words with the reference; order counts."""
    kill, killed = (f"police {word} the gunman".split() for word in ("kill", "killed"))
    assert rouge_l([kill], [[killed]]) == pytest.approx(75)
    two = rouge_l([["a", "b"]], [[["a", "x", "y", "z"], ["b", "a"]]])
    precision, recall = 1 / 2, 1 / 2  # the better of 1/2 and 1/2; of 1/4 and 1/2
    assert two == pytest.approx(100 * (1 + 1.44) * precision * recall / (recall + 1.44 * precision))
    assert rouge_l([["q"]], [[["a"]]]) == 0 and rouge_l([[]], [[["a"]]]) == 0


DOG, CAT = [["a", "dog"]], [["a", "cat"]]  # the references of two pictures; "a" describes both and weighs nothing


def test_cider_by_hand() -> None:
    assert cider([*DOG, *CAT], [DOG, CAT]) == pytest.approx(100 * 10 * 2 / 4)  # of one and two words; none has three
    twice = [["dog", "dog"]]
    assert Cider([DOG, CAT], is_d=False).scores(twice, [DOG]) == pytest.approx([10 * 1 / 4])
    assert Cider([DOG, CAT]).scores(twice, [DOG]) == pytest.approx([10 * (1 / 2) / 4])  # clipped
    shorter = math.exp(-1 / 72)  # no bigram against one
    assert Cider([DOG, CAT]).score(["dog"], DOG) == pytest.approx(10 * shorter / 4)
    assert cider_d([["q"], ["q"]], [DOG, CAT]) == 0 and cider_d([[], []], [DOG, CAT]) == 0


def test_cider_is_the_mean_over_references_and_pictures() -> None:
    corpus = [[["a", "dog"], ["one", "cow"]], CAT]
    assert Cider(corpus).score(["a", "dog"], corpus[0]) == pytest.approx(10 * (2 / 4) / 2)
    assert cider_d([["a", "dog"], ["q"]], corpus) == pytest.approx(100 * 10 * (2 / 4) / 2 / 2)


def test_captioners_are_scored_so(tmp_path: Path) -> None:
    model = {
        "architecture": "generator",
        "encoder": {"input": "image", "backbone": {"image_size": [8, 8], "channels": [4]}},
        "decoder": {"embedding_size": 8, "recurrent": {"hidden_size": 8}},
    }
    run = {"max_steps": 1, "max_eval_samples": 8, "rows_per_batch": 8}
    train(recipe("caption", directory=tmp_path, model=model, data={"generated": "captions"}, run=run))
    scores = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    assert {
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "rouge_l",
        "cider",
        "cider_d",
        "bleu",
        "chrf",
        "nll",
    } <= scores.keys()
