"""Examples in a file: the same numbers and batches as from a list, read where they stand, and never a wrong one."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import training.run
from seqmodels.tokenizer import BOS, PAD
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TAGGER, TEXT_ENCODER, TRANSLATOR, WORDS, recipe
from training.data.batches import Buckets
from training.data.encoded import ENCODED, Encoded, is_encodable
from training.data.examples import Codec, Example
from training.data.rows import Row
from training.data.streams import Streams
from training.run import train

PAIRS = [Row("a b c", ("x y", "z")), Row("a", ("x",)), Row("", ("y",)), Row("b c " * 20, ("y z " * 20,))]
LABELLED = [Row("a b c", "yes"), Row("a", "no"), Row("c " * 300, "yes")]
SEVERAL = [Row("a b c", ("red", "blue")), Row("a", ()), Row("b", ("blue",))]
TAGGED = [Row(("a", "b-c"), ("X", "Y")), Row(("c",), ("X",))]
TEXTS = [Row(None, (f"a b c {n}",)) for n in range(40)]
KINDS: dict[str, tuple[str, dict[str, Any], Sequence[Row]]] = {
    "translate": ("numbers-en-fr", TRANSLATOR, PAIRS),
    "classify": ("sentiment", CLASSIFIER, LABELLED),
    "several labels": ("sentiment", {**CLASSIFIER, "problem_type": "multi_label_classification"}, SEVERAL),
    "tag": ("number-tags", TAGGER, TAGGED),
    "generate": ("language-model", LANGUAGE_MODEL, TEXTS),
}


def codec_of(kind: str) -> tuple[Codec, Sequence[Row]]:
    generated, model, rows = KINDS[kind]
    task = "classify" if kind == "several labels" else kind
    return Codec.train(recipe(task, data={"generated": generated, "tokenizer": WORDS}, model=model), rows), rows


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    codec, rows = codec_of("translate")
    Encoded.of(codec.examples(rows)).save(tmp_path / ENCODED, "here")
    return tmp_path / ENCODED


# Examples and batches


@pytest.mark.parametrize("kind", KINDS)
def test_examples_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    codec, rows = codec_of(kind)
    assert is_encodable(codec.config)
    expected, made = codec.encode(rows), Encoded.of(codec.examples(rows))
    made.save(tmp_path / ENCODED, "here")
    loaded = Encoded.load(tmp_path / ENCODED, "here")
    assert loaded is not None
    for encoded in (made, loaded):
        assert list(encoded) == expected and encoded[1:3] == expected[1:3] and encoded[-1] == expected[-1]
    assert [path.name for path in tmp_path.iterdir()] == [ENCODED]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "generate"])
def test_batches_are_the_same_to_the_bit(kind: str) -> None:
    codec, rows = codec_of(kind)
    rows = [*rows] * 5
    from_list, from_arrays = (
        Buckets(examples, codec, 60, 4, seed=1) for examples in (codec.encode(rows), Encoded.of(codec.examples(rows)))
    )
    assert len(from_list) == len(from_arrays) > 1 and from_list.padding_share == from_arrays.padding_share
    for epoch in range(3):
        for index in range(len(from_list)):
            one, other = from_list.batch(epoch, index), from_arrays.batch(epoch, index)
            assert one.keys() == other.keys()
            assert all(one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 7), (4, 5), (7, 64), (3, 1)])
def test_streams_are_cuts_of_one_table(rows: int, chunk: int, seed: int | None) -> None:
    """Written out in numpy: the text from where an epoch begins, in `rows` equal parts, a BOS before each."""
    codec, texts = codec_of("generate")
    examples = codec.encode(texts)
    streams = Streams(Encoded.of(examples), rows, chunk, seed)
    tokens = [token for example in examples for token in example.targets][1:]
    length = -(-len(tokens) // rows)
    for epoch in range(3):
        offset = 0 if seed is None else random.Random(f"{seed}:{epoch}").randrange(len(tokens))
        text = tokens[offset:] + tokens[:offset] + [PAD] * (rows * length - len(tokens))
        table = np.column_stack([np.full(rows, BOS), np.reshape(text, (rows, length))])
        for index in range(len(streams)):
            batch = streams.batch(epoch, index)
            expected = table[:, index * chunk : (index + 1) * chunk + 1]
            assert batch["labels"].dtype == torch.int64 and batch["labels"].is_contiguous()
            assert batch["labels"].tolist() == expected.tolist()
            assert batch["label_lengths"].sum() == (expected != PAD).sum()


def test_what_is_no_text_stays_as_it_is() -> None:
    spelt = {**TAGGER, "encoder": {**TEXT_ENCODER, "characters": {"embedding_size": 4, "hidden_size": 4}}}
    numbers = {**CLASSIFIER, "problem_type": "regression"}
    steps = {"architecture": "classifier", "encoder": {"input": "features", "recurrent": {"hidden_size": 4}}}
    for task, generated, model, rows in (
        ("tag", "number-tags", spelt, TAGGED),
        ("classify", "sentiment", numbers, [Row("a", ("1",)), Row("b", ("2",))]),
        ("classify", "series", steps, [Row(((1.0,),), "x"), Row(((2.0,),), "y")]),
    ):
        data = {"generated": generated} | ({} if generated == "series" else {"tokenizer": WORDS})
        made = recipe(task, data=data, model=model)
        assert not is_encodable(Codec.train(made, rows).config)


# The file


def test_numbers_are_mapped_not_read(saved: Path) -> None:
    loaded = Encoded.load(saved, "here")
    assert loaded is not None and str(saved) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_file_of_another_source_is_absent(saved: Path) -> None:
    assert Encoded.load(saved, "elsewhere") is None
    assert Encoded.load(saved.with_name("nothing"), "here") is None


def test_every_damaged_byte_and_every_cut_is_noticed(saved: Path) -> None:
    """Read as before, or not at all; a damaged header may say the same in other spaces."""
    expected, whole = list(Encoded.load(saved, "here") or ()), saved.read_bytes()
    for place in range(len(whole)):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = Encoded.load(saved, "here")
        assert found is None or list(found) == expected
    for length in range(0, len(whole), 7):
        saved.write_bytes(whole[:length])
        assert Encoded.load(saved, "here") is None


# Runs


@pytest.fixture
def interrupted(tmp_path: Path, train_until: TrainUntil) -> Path:
    """A run of six steps that ended before its fourth."""
    train_until(six_steps(tmp_path), 3)
    assert (tmp_path / ENCODED).exists()
    return tmp_path


def six_steps(directory: Path) -> Any:
    return recipe(directory=directory, run={"max_steps": 6, "save_steps": 1, "eval_steps": 3})


def bits(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "model.safetensors").read_bytes(), (directory / "metrics.jsonl").read_bytes()


def test_going_on_encodes_nothing_again(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a finished run keeps no file."""
    monkeypatch.setattr(Encoded, "of", None)
    train(six_steps(interrupted))
    assert not (interrupted / ENCODED).exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    """By a good file of other data."""
    Encoded.of([Example([4], 0, 1, 0)]).save(path, "elsewhere")


@pytest.mark.parametrize("harm", [cut, damage, replace, Path.unlink])
def test_a_run_ends_the_same_whatever_became_of_its_file(harm: Callable[[Path], None], interrupted: Path) -> None:
    straight = interrupted / "straight"
    train(six_steps(straight))
    harm(interrupted / ENCODED)
    train(six_steps(interrupted))
    assert bits(interrupted) == bits(straight)


def test_a_file_from_a_run_on_other_data_is_made_anew(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = training.run.load_rows(six_steps(interrupted))["train"]
    other = interrupted / "other"
    other.mkdir()
    run_file = (interrupted / "run.json").read_bytes()
    (other / "run.json").write_bytes(run_file.replace(b'"data": "', b'"data": "0'))
    training.run._encoded(other, Codec.train(six_steps(other), rows), rows[:9])
    shutil.copy(other / ENCODED, interrupted / ENCODED)
    seen = []
    monkeypatch.setattr(training.run, "_introduce", lambda *given: seen.append(len(given[3])))
    train(six_steps(interrupted))
    assert seen == [len(rows)]
