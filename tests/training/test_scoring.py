"""Scores of a model directory: tags that the model never gave, texts that are written freely."""

import argparse
import errno
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqmodels.pretrained import load_pretrained
from seqmodels.reading import Reading, spans_of
from seqmodels.rendering import render_tags
from tests.training.recipes import TAGGER, TRANSLATOR, WORDS, recipe
from training.__main__ import _members, main
from training.config import DataSection
from training.data.examples import Codec
from training.data.rows import Row
from training.data.sources import load_rows
from training.run import train
from training.scoring import _from_best_to_worst, _score_tags, score


def codec_of(directory: Path) -> Codec:
    saved = load_pretrained(directory)
    return Codec.of(saved, DataSection(generated="sentiment"))


def test_words_beyond_a_taggers_longest_input_are_never_right(tmp_path: Path) -> None:
    """Not even where O is right, which a tagger of spans gives by saying nothing."""
    data = {"generated": "number-tags", "tokenizer": WORDS, "max_input_length": 40}
    directory = train(recipe("tag", tmp_path, data=data, model=TAGGER))
    short, long = Row(("a",) * 40, ("O",) * 40), Row(("a",) * 60, ("O",) * 60)
    _, shown = score(directory, [short, long], codec_of(directory)).samples
    given = [word.rpartition("/")[2] for word in shown["answer"].split("  ")]
    assert all(given[:40]) and not any(given[40:])
    assert len(shown["wrong"].splitlines()) >= 20


@pytest.mark.parametrize(
    ("expected", "guess", "accuracy"),
    [
        (["I-PER", "I-PER", "O"], ["I-PER", "I-PER", "O"], 1.0),  # as IOB1 writes it
        (["B-PER", "I-PER", "O"], ["I-PER", "I-PER", "O"], 1.0),  # the same span is served
        (["B-PER", "B-PER", "O"], ["B-PER", "I-PER", "O"], 2 / 3),
        (["B-PER", "I-PER", "O"], ["O", "I-PER", "I-PER"], 0.0),
    ],
)
def test_accuracy_is_of_tags_as_their_spans_are_written(expected: list[str], guess: list[str], accuracy: float) -> None:
    labels, words = ("B-PER", "I-PER", "O"), ("Anna", "Lee", "sleeps")
    chances = torch.full((3, 3), 0.05)
    chances[range(3), [labels.index(tag) for tag in guess]] = 0.9
    reading = Reading(text=" ".join(words), spans=tuple(spans_of(words)), positions=(0, 1, 2))
    scored = _score_tags([Row(words, tuple(expected))], [render_tags(labels, reading, chances)], [3], 0.1, bio=True)
    assert scored.scores["accuracy"] == pytest.approx(accuracy)
    assert ("expected" in scored.samples[0]["wrong"]) == (accuracy < 1)


def test_what_is_sampled_is_the_same_whenever_it_is_scored(tmp_path: Path) -> None:
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    directory = train(recipe("translate", tmp_path, data=data, model=TRANSLATOR, generation={"do_sample": True}))
    codec, rows = codec_of(directory), load_rows(recipe("translate", data=data, model=TRANSLATOR))["validation"][:8]
    one, two = score(directory, rows, codec), score(directory, rows, codec)
    assert [sample["answer"] for sample in one.samples] == [sample["answer"] for sample in two.samples]
    other = score(directory, rows, codec, params={"seed": 77})
    assert [sample["answer"] for sample in one.samples] != [sample["answer"] for sample in other.samples]
    same = score(directory, rows[:1] * 4, codec)  # rows draw each for itself
    assert len({sample["answer"] for sample in same.samples}) > 1


def test_validation_writes_freely(tmp_path: Path) -> None:
    """Targets that are spoilt spoil no text: nothing of them is read while it is written."""
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    directory = train(recipe("translate", tmp_path, data=data, model=TRANSLATOR))
    codec, rows = codec_of(directory), load_rows(recipe("translate", data=data, model=TRANSLATOR))["validation"][:30]
    spoilt = [replace(row, target=("zero zero zero",)) for row in rows]
    one, two = score(directory, rows, codec), score(directory, spoilt, codec)
    assert [sample["answer"] for sample in one.samples] == [sample["answer"] for sample in two.samples]
    assert one.scores["nll"] != two.scores["nll"], "which is of the targets"


def test_scores_are_told_where_they_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(recipe(directory=tmp_path))

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("training.checkpoint.write_whole", refuse)
    capsys.readouterr()
    assert main(["evaluate", str(directory), "--split", "validation"]) == 2
    told = capsys.readouterr()
    assert "accuracy" in told.out
    assert f"{directory / 'evaluation-validation.json'} could not be written: Read-only file system" in told.err


def test_scores_are_kept_though_nobody_reads_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = train(recipe(directory=tmp_path))

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["evaluate", str(directory), "--split", "validation"]) == 2  # a pipe, but not that of the output
    assert "accuracy" in (directory / "evaluation-validation.json").read_text(encoding="utf-8")


def test_a_model_directory_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "seed=2").mkdir()
    options = argparse.Namespace(overrides=[str(tmp_path / "seed=2"), "run.seed=2"], average=None)
    assert _members(options)[:2] == ([tmp_path / "seed=2"], ["run.seed=2"])


def test_captions_are_shown_from_the_best_to_the_worst() -> None:
    rows = [Row(bytes([n]), ("a dog runs", f"word {n}")) for n in range(25)]
    texts = [("a dog runs " * (n % 5 + 1)).strip() if n != 7 else "nothing" for n in range(25)]
    each = [float(n) for n in range(25)]
    shown = _from_best_to_worst(rows, texts, each)
    assert [sample["row"] for sample in shown] == ["25", "23", "20", "17", "15", "12", "9", "7", "4", "1"]
    assert shown[0] == {"row": "25", "cider_d": "2400.0", "answer": texts[24], "expected": "a dog runs / word 24"}
    assert (
        len(_from_best_to_worst(rows[:3], texts, each[:3])) == 3
        and len(_from_best_to_worst(rows[:1], texts, [1.0])) == 1
    )
