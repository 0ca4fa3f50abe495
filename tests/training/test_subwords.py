"""BPE-dropout against a case by hand and against the library's own, and as a function of (seed, epoch)."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.errors import ConfigError
from seqmodels.pretrained import load_pretrained
from seqmodels.tokenizer import BOS, EOS, SPECIAL_TOKENS, Tokenizer
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TAGGER, TRANSLATOR, recipe
from training.data.batches import Batch, Buckets
from training.data.encoded import Encoded
from training.data.examples import Codec
from training.data.generated import generate
from training.data.subwords import Splitter
from training.run import train

TEXTS = [
    "the cat sat on the mat",
    "a cat and the other cats sat, it's 12 o'clock",
    "Grüße, die Katze saß – dort 北京",
] * 3
DROPOUT = {"kind": "bpe", "vocab_size": 400, "dropout": 0.3}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, "bpe", 320)


def of_merges(*merges: tuple[str, str]) -> Tokenizer:
    pieces = [*SPECIAL_TOKENS, "a", "b", "c", *("".join(merge) for merge in merges)]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(merges))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def test_by_hand() -> None:
    """a+b is learned first, b+c last: where a+b is passed over, b+c may take its place, and then nothing is left."""
    made = of_merges(("a", "b"), ("ab", "c"), ("b", "c"))
    splitter, count, p = Splitter(made, 0.3, 1), 20_000, 0.3
    found = Counter(" ".join(map(made.token, splitter.split("abc", way))) for way in range(count))
    expected = {"abc": (1 - p) ** 2, "ab c": (1 - p) * p, "a bc": p * (1 - p), "a b c": p * p}
    assert found.keys() == expected.keys()
    for split, share in expected.items():
        assert abs(found[split] / count - share) < 4 * (share * (1 - share) / count) ** 0.5, split


def test_ways_are_as_frequent_as_the_librarys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    library, splitter, count = (
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        Splitter(tokenizer, 0.25, 7),
        4000,
    )
    library.model.dropout = 0.25
    (word,) = tokenizer.words(tokenizer.encode("cats")) or ()
    ours = Counter(splitter.split(word, way) for way in range(count))
    theirs = Counter(tuple(library.encode(" cats").ids) for _ in range(count))
    assert len(theirs) > 3
    for split in ours | theirs:
        mean = (ours[split] + theirs[split]) / 2 / count
        assert abs(ours[split] - theirs[split]) / count < 5 * (2 * mean * (1 - mean) / count) ** 0.5, split


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_is_the_same_and_without_dropout_the_pieces_too(tokenizer: Tokenizer, text: str) -> None:
    ids, draw = tokenizer.encode(text), np.random.default_rng(1)
    assert Splitter(tokenizer, 0.0, 1)([BOS, *ids, EOS], draw) == [BOS, *ids, EOS]
    begins, *others, ends = Splitter(tokenizer, 0.5, 1)([BOS, *ids, EOS], draw)
    assert (begins, ends) == (BOS, EOS) and tokenizer.decode(others) == tokenizer.decode(ids)


def test_a_text_that_ends_within_a_character_stays_as_it_is(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the mat 🐈")[:-1]
    assert all(Splitter(tokenizer, 0.9, seed)(ids, np.random.default_rng(seed)) == ids for seed in range(20))


def batches(codec: Codec, rows: Any, seed: int, epoch: int, dropout: float = 0.3) -> list[Batch]:
    made = Buckets(Encoded.of(codec.examples(rows)), codec, 400, 8, seed, tokenizer_dropout=dropout)
    return [made.batch(epoch, index) for index in range(len(made))]


def test_sources_and_targets_are_split_as_a_function_of_seed_and_epoch() -> None:
    rows = generate("numbers-en-fr")["train"][:60]
    made = recipe("translate", data={"generated": "numbers-en-fr", "tokenizer": DROPOUT}, model=TRANSLATOR)
    codec = Codec.train(made, rows)
    assert codec.source_tokenizer and codec.target_tokenizer
    tokenizers_of = {"inputs": (codec.source_tokenizer, "lengths"), "labels": (codec.target_tokenizer, "label_lengths")}

    def texts(found: list[Batch], name: str) -> list[str]:
        tokenizer, lengths = tokenizers_of[name]
        return [
            tokenizer.decode(row[:n])
            for batch in found
            for row, n in zip(batch[name].tolist(), batch[lengths], strict=True)
        ]

    def numbers(found: list[Batch], name: str) -> list[list[int]]:
        return [row for batch in found for row in batch[name].tolist()]

    first, plain = batches(codec, rows, 1, 0), batches(codec, rows, 1, 0, dropout=0.0)
    for name, (_, lengths) in tokenizers_of.items():
        assert numbers(first, name) == numbers(batches(codec, rows, 1, 0), name)
        assert numbers(first, name) != numbers(batches(codec, rows, 2, 0), name)
        assert sorted(texts(first, name)) == sorted(texts(plain, name))
        assert sorted(texts(first, name)) == sorted(texts(batches(codec, rows, 1, 1), name))
        assert sorted(numbers(first, name)) != sorted(numbers(batches(codec, rows, 1, 1), name))
        assert sum(int(b[lengths].sum()) for b in first) > 1.2 * sum(int(b[lengths].sum()) for b in plain)


def test_texts_of_one_length_share_a_batch_as_they_are_split_in_that_epoch() -> None:
    rows = generate("numbers-en-fr")["train"][:200]
    codec = Codec.train(
        recipe("translate", data={"generated": "numbers-en-fr", "tokenizer": DROPOUT}, model=TRANSLATOR), rows
    )
    for epoch in range(3):
        lengths = [batch["label_lengths"] for batch in batches(codec, rows, 1, epoch)]
        spans = sorted((int(found.min()), int(found.max())) for found in lengths)
        assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))
    assert sorted(map(len, lengths)) == sorted(len(b["labels"]) for b in batches(codec, rows, 1, 0, dropout=0.0))


def test_a_classifier_reads_other_pieces_and_keeps_its_labels() -> None:
    rows = generate("sentiment")["train"][:60]
    codec = Codec.train(recipe(data={"generated": "sentiment", "tokenizer": DROPOUT}, model=CLASSIFIER), rows)
    first, plain = batches(codec, rows, 1, 0), batches(codec, rows, 1, 0, dropout=0.0)
    tokenizer = codec.source_tokenizer
    assert tokenizer

    def labelled(found: list[Batch]) -> list[tuple[str, int]]:
        return sorted(
            (tokenizer.decode(ids), label)
            for b in found
            for ids, label in zip(b["inputs"].tolist(), b["labels"].tolist(), strict=True)
        )

    assert labelled(first) == labelled(plain)
    assert sum(int(b["lengths"].sum()) for b in first) > 1.2 * sum(int(b["lengths"].sum()) for b in plain)


def test_a_run_that_was_stopped_goes_on_with_the_same_pieces(tmp_path: Path, train_until: TrainUntil) -> None:
    def of(name: str) -> Any:
        data = {"generated": "numbers-en-fr", "tokenizer": DROPOUT}
        run = {"max_steps": 5, "save_steps": 2, "rows_per_batch": 8, "max_eval_samples": 4}
        return recipe("translate", tmp_path / name, data=data, model=TRANSLATOR, run=run)

    train(of("whole"))
    train_until(of("stopped"), 3)
    train(of("stopped"))
    whole, stopped = (load_pretrained(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.revision == stopped.revision
    rows = generate("numbers-en-fr")["train"]  # what a finished model reads is split as ever
    plain = Codec.train(of("plain"), rows).source_tokenizer
    assert plain and whole.source_tokenizer and whole.source_tokenizer.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("task", "generated", "model", "words"),
    [
        ("generate", "language-model", LANGUAGE_MODEL, r"dropout is 0\.3, but task generate reads one running text"),
        ("tag", "number-tags", TAGGER, r"dropout is 0\.3, but task tag reads texts with a label for each word"),
        (
            "classify",
            "series",
            {"architecture": "classifier", "encoder": {"input": "features", "recurrent": {"hidden_size": 8}}},
            r"the model reads features and writes no text; remove it",
        ),
    ],
)
def test_where_it_does_nothing_it_is_refused(task: str, generated: str, model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(task, data={"generated": generated, "tokenizer": DROPOUT}, model=model)
