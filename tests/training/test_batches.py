"""Rows to examples, examples to batches by length, running text to streams."""

from dataclasses import replace

import pytest
import torch

from seqmodels.losses import IGNORE
from seqmodels.models import build_model
from seqmodels.tokenizer import BOS, EOS, PAD
from tests.training.recipes import DECODER, TAGGER, TRANSLATOR, WORDS, recipe
from training.data.batches import Buckets, collate
from training.data.examples import Codec
from training.data.generated import generate
from training.data.grids import Grids
from training.data.rows import Row

NO_GRIDS = Grids(torch.zeros(0, 32, dtype=torch.uint8), torch.zeros(0))


def test_batches_of_the_three_architectures() -> None:
    rows = [Row(("a", "bb", "c"), ("O", "B-X", "I-X")), Row(("bb",), ("B-X",))]
    tagger = Codec.train(recipe("tag", data={"generated": "number-tags", "tokenizer": WORDS}, model=TAGGER), rows)
    batch = collate(tagger.encode(rows), tagger)
    names = [[tagger.config.labels[n] if n != IGNORE else "-" for n in row] for row in batch["labels"].tolist()]
    assert names == [["O", "B-X", "I-X"], ["B-X", "-", "-"]]
    assert batch["lengths"].tolist() == [3, 1] and batch["inputs"][1].tolist()[1:] == [PAD, PAD]

    pairs = [Row("a b", ("x y",)), Row("b", ("y",))]
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    translator = Codec.train(recipe("translate", data=data, model=TRANSLATOR), pairs)
    batch = collate(translator.encode(pairs), translator)
    assert batch["inputs"][0].tolist()[-1] == EOS and batch["lengths"].tolist() == [3, 2]
    assert batch["labels"][:, 0].tolist() == [BOS, BOS]
    assert batch["labels"][1].tolist()[2:] == [EOS, PAD] and batch["label_lengths"].tolist() == [4, 3]


def test_a_label_stands_at_a_words_last_piece() -> None:
    rows = [Row(("abcdef", "xy"), ("B-X", "O")), Row(("xy",), ("O",))]
    data = {"generated": "number-tags", "tokenizer": {"kind": "byte"}}
    codec = Codec.train(recipe("tag", data=data, model=TAGGER), rows)
    example = codec.encode(rows)[0]
    ids, last = codec.source_tokenizer.encode_words(["abcdef", "xy"]) if codec.source_tokenizer else ([], [])
    assert isinstance(example.targets, list) and example.inputs == ids
    assert [place for place, label in enumerate(example.targets) if label != IGNORE] == last


def test_pictures_frames_and_features() -> None:
    image = {"input": "image", "backbone": {"image_size": [32, 32], "channels": [4]}}
    captioner = {"architecture": "generator", "encoder": image, "decoder": DECODER}
    rows = generate("captions")["train"][:3]
    codec = Codec.train(recipe("caption", data={"generated": "captions", "tokenizer": WORDS}, model=captioner), rows)
    batch = collate(codec.encode(rows), codec)
    assert batch["inputs"].shape == (3, 3, 32, 32) and "lengths" not in batch
    build_model(codec.config)(**batch).loss.backward()

    frames = {"input": "frames", "backbone": {"image_size": [16, 16], "channels": [4]}}
    clips = generate("frames")["train"][:3]
    model = {"architecture": "tagger", "encoder": frames}
    codec = Codec.train(recipe("tag", data={"generated": "frames"}, model=model), clips)
    batch = collate(codec.encode(clips), codec)
    longest = max(len(row.target) for row in clips)
    assert batch["inputs"].shape == (3, longest, 3, 16, 16) and batch["labels"].shape == (3, longest)
    build_model(codec.config)(**batch).loss.backward()

    waves = generate("series")["train"][:9]
    model = {"architecture": "classifier", "encoder": {"input": "features"}}
    codec = Codec.train(recipe(data={"generated": "series"}, model=model), waves)
    assert codec.config.encoder is not None and getattr(codec.config.encoder, "feature_size", 0) == 2
    batch = collate(codec.encode(waves), codec)
    assert batch["inputs"].dtype == torch.float32 and batch["labels"].shape == (9,)
    build_model(codec.config)(**batch).loss.backward()


def test_too_long_rows_are_cut_for_classifiers_and_left_out_for_others() -> None:
    texts = [Row("a b c d e f", "x"), Row("a", "y")]
    data = {"generated": "sentiment", "tokenizer": WORDS, "max_input_length": 4}
    codec = Codec.train(recipe(data=data), texts)
    assert [example.input_length for example in codec.encode(texts)] == [4, 1]
    pairs = [Row("a b c d e f", ("a",)), Row("a", ("a b c d e f",)), Row("a b c d", ("a b c d",))]
    data |= {"generated": "numbers-en-fr", "max_target_length": 4}
    codec = Codec.train(recipe("translate", data=data, model=TRANSLATOR), pairs)
    assert [(example.input_length, example.target_length) for example in codec.encode(pairs)] == [(5, 6)]


def buckets(seed: int = 1, tokens: int = 400, rows: int = 32) -> Buckets:
    source = generate("numbers-en-fr")["train"][:500]
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    codec = Codec.train(recipe("translate", data=data, model=TRANSLATOR), source)
    return Buckets(codec.encode(source), codec, tokens, rows, seed)


def test_an_epoch_shows_every_row_once_within_the_budget() -> None:
    made = buckets()
    for epoch in (0, 1):
        assert sorted(row for batch in made.epoch(epoch).batches for row in batch) == list(range(500))
        assert len(made.epoch(epoch).batches) == len(made)
        for index in range(len(made)):
            batch = made.batch(epoch, index)
            assert batch["inputs"].numel() + batch["labels"].numel() <= 400 and len(batch["inputs"]) <= 32


def test_the_order_is_a_pure_function_of_seed_epoch_and_step() -> None:
    one, two = buckets(), buckets()
    two.batch(3, 1)  # a look at another epoch must not matter
    assert one.epoch(0).batches == two.epoch(0).batches and one.epoch(7).batches == two.epoch(7).batches
    assert one.epoch(0).batches != one.epoch(1).batches
    assert one.epoch(0).batches != buckets(seed=2).epoch(0).batches


def test_bucketing_wastes_little() -> None:
    made = buckets()
    batches = [made.batch(0, index) for index in range(len(made))]
    positions = sum(batch["inputs"].numel() + batch["labels"].numel() for batch in batches)
    real = sum(int(batch["lengths"].sum() + batch["label_lengths"].sum()) for batch in batches)
    assert made.padding_share == pytest.approx(1 - real / positions) and 0 < made.padding_share < 0.1


def test_pictures_are_not_sorted_by_their_captions_lengths() -> None:
    image = {"input": "image", "backbone": {"image_size": [32, 32], "channels": [4]}}
    captioner = {"architecture": "generator", "encoder": image, "decoder": DECODER}
    rows = generate("captions")["train"][:400]
    codec = Codec.train(recipe("caption", data={"generated": "captions", "tokenizer": WORDS}, model=captioner), rows)
    lengths = [example.target_length for example in codec.encode(rows)]
    made = Buckets(codec.encode(rows), codec, 1000, 32, seed=1)
    assert all(len({lengths[row] for row in batch}) > 1 for batch in made.epoch(0).batches if len(batch) > 16)
    # Where grids have been made of them, no batch normalisation sees them any more.
    frozen = Buckets(codec.encode(rows), replace(codec, grids=NO_GRIDS), 1000, 32, seed=1)
    assert frozen.padding_share < made.padding_share / 4


def test_batches_hold_all_references_of_their_pictures_where_they_are_asked_for() -> None:
    image = {"input": "image", "backbone": {"image_size": [32, 32], "channels": [4]}}
    captioner = {"architecture": "generator", "encoder": image, "decoder": DECODER}
    rows = [replace(row, target=(*row.references, "another")) for row in generate("captions")["train"][:5]]
    codec = Codec.train(recipe("caption", data={"generated": "captions", "tokenizer": WORDS}, model=captioner), rows)
    made = Buckets(codec.encode(rows), codec, 1000, 32, seed=1, with_references=True)
    batch = made.batch(0, 0)
    assert batch["labels"].shape[0] == 10 == len(batch["references"])
    assert {tuple(one) for one in batch["references"]} == {tuple(row.references) for row in rows}
    for labels, references in zip(batch["labels"].tolist(), batch["references"], strict=True):
        assert codec.target_tokenizer is not None and codec.target_tokenizer.decode(labels) in references
    assert "references" not in Buckets(codec.encode(rows), codec, 1000, 32, seed=1).batch(0, 0)
    clips = [replace(row, target=(*row.references, "another")) for row in generate("clip-captions")["train"][:5]]
    frames = {"input": "frames", "backbone": {"image_size": [16, 16], "channels": [4]}}
    made_of = {"data": {"generated": "clip-captions", "tokenizer": WORDS}, "model": {**captioner, "encoder": frames}}
    examples = Codec.train(recipe("caption", **made_of), clips).encode(clips)
    assert [example.references for example in examples] == [row.references for row in clips for _ in range(2)]
