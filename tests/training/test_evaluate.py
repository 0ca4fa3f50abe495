"""Scores of a model directory: tags that the model never gave, texts that are written freely."""

from dataclasses import replace
from pathlib import Path

from seqmodels.pretrained import load_pretrained
from tests.training.recipes import TAGGER, TRANSLATOR, WORDS, recipe
from training.config import DataSection
from training.data.examples import Codec
from training.data.rows import Row
from training.data.sources import load_rows
from training.evaluate import evaluate
from training.run import train


def codec_of(directory: Path) -> Codec:
    saved = load_pretrained(directory)
    return Codec.of(saved, DataSection(generated="sentiment"))


def test_words_beyond_a_taggers_longest_input_are_never_right(tmp_path: Path) -> None:
    """Not even where O is right, which a tagger of spans gives by saying nothing."""
    data = {"generated": "number-tags", "tokenizer": WORDS, "max_input_length": 40}
    directory = train(recipe("tag", tmp_path, data=data, model=TAGGER))
    short, long = Row(("a",) * 40, ("O",) * 40), Row(("a",) * 60, ("O",) * 60)
    _, shown = evaluate(directory, [short, long], codec_of(directory)).samples
    given = [word.rpartition("/")[2] for word in shown["answer"].split("  ")]
    assert all(given[:40]) and not any(given[40:])
    assert len(shown["wrong"].splitlines()) >= 20


def test_validation_writes_freely(tmp_path: Path) -> None:
    """Targets that are spoilt spoil no text: nothing of them is read while it is written."""
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    directory = train(recipe("translate", tmp_path, data=data, model=TRANSLATOR))
    codec, rows = codec_of(directory), load_rows(recipe("translate", data=data, model=TRANSLATOR))["validation"][:30]
    spoilt = [replace(row, target=("zero zero zero",)) for row in rows]
    one, two = evaluate(directory, rows, codec), evaluate(directory, spoilt, codec)
    assert [sample["answer"] for sample in one.samples] == [sample["answer"] for sample in two.samples]
    assert one.scores["nll"] != two.scores["nll"], "which is of the targets"
