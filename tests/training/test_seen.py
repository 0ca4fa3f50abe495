"""The guard that refuses to score a model on pictures that it was trained on."""

from pathlib import Path
from typing import Any

import pytest

from seqmodels.errors import DataError
from tests.training.recipes import LANGUAGE_MODEL, WORDS, recipe
from training.data.generated import generate
from training.data.rows import Row
from training.evaluate import evaluate
from training.run import train
from training.seen import SEEN, keep_seen, refuse_seen

TRAINED = [Row(b"one", "x"), Row(b"two", "y"), Row(b"one", "z")]
CLIPS = [Row((b"one", b"two"), ("left", "right"))]


def test_a_picture_that_was_trained_on_is_refused_and_named(tmp_path: Path) -> None:
    keep_seen(TRAINED, tmp_path)
    refuse_seen([Row(b"three", "x")], "test", tmp_path)
    with pytest.raises(DataError, match=r"trained on 2 of the 3 inputs of the test split, the first in row 2.*--split"):
        refuse_seen([Row(b"three", "x"), Row(b"two", "a"), Row(b"one", "b")], "test", tmp_path)


def test_a_clip_is_another_where_a_frame_is(tmp_path: Path) -> None:
    keep_seen(CLIPS, tmp_path)
    refuse_seen([Row((b"two", b"one"), ("left", "right")), Row(b"one", "x")], "test", tmp_path)
    with pytest.raises(DataError, match="trained on 1 of the 1 inputs"):
        refuse_seen(CLIPS, "test", tmp_path)


@pytest.mark.parametrize("given", ["a text", ("some", "words"), ((0.5,), (1.0,)), None])
def test_only_pictures_and_clips_are_kept(tmp_path: Path, given: Any) -> None:
    """A text may well come twice in the world."""
    keep_seen(TRAINED, tmp_path)
    keep_seen([Row(given, "x")], tmp_path)
    assert not (tmp_path / SEEN).exists()
    refuse_seen([Row(given, "x"), Row(b"one", "y")], "test", tmp_path)


def test_evaluate_refuses_what_its_run_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [2, 4]}}
    made = recipe(
        "caption",
        tmp_path / "run",
        data={"generated": "captions", "tokenizer": WORDS},
        model={"architecture": "generator", "encoder": encoder, "decoder": LANGUAGE_MODEL["decoder"]},
        run={"max_steps": 1, "max_eval_samples": 2},
    )
    train(made)
    rows = {split: some[:20] for split, some in generate("captions").items()}
    monkeypatch.setattr("training.evaluate.rows_to_score", lambda *_: rows)
    assert evaluate(tmp_path / "run", made, "test", {})[0]["rows"] == 20
    assert evaluate(tmp_path / "run", made, "train", {})[0]["rows"] == 20
    rows["test"] = rows["train"]
    with pytest.raises(DataError, match="run was trained on 20 of the 20 inputs of the test split"):
        evaluate(tmp_path / "run", made, "test", {})
