"""The guard that refuses to score a model on pictures that it was trained on."""

from pathlib import Path
from typing import Any

import pytest

from seqmodels.errors import DataError
from tests.training.recipes import LANGUAGE_MODEL, WORDS, recipe
from training.average import average_directories
from training.config import Recipe
from training.data.generated import generate
from training.data.rows import Row
from training.evaluate import evaluate
from training.run import train
from training.seen import SEEN, keep_seen, refuse_seen

TRAINED = [Row(b"one", "x"), Row(b"two", "y"), Row(b"one", "z")]
CLIPS = [Row((b"one", b"two"), ("left", "right"))]


def test_a_picture_that_was_trained_on_is_refused_and_named(tmp_path: Path) -> None:
    keep_seen(TRAINED, tmp_path)
    refuse_seen([Row(b"three", "x")], "test", tmp_path, print)
    with pytest.raises(DataError, match=r"trained on 2 of the 3 inputs of the test split, the first in row 2.*--split"):
        refuse_seen([Row(b"three", "x"), Row(b"two", "a"), Row(b"one", "b")], "test", tmp_path, print)


def test_a_clip_is_another_where_a_frame_is(tmp_path: Path) -> None:
    keep_seen(CLIPS, tmp_path)
    refuse_seen([Row((b"two", b"one"), ("left", "right")), Row(b"one", "x")], "test", tmp_path, print)
    with pytest.raises(DataError, match="trained on 1 of the 1 inputs"):
        refuse_seen(CLIPS, "test", tmp_path, print)


def test_a_run_that_begins_from_a_model_has_seen_what_that_has(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    keep_seen(TRAINED, first)
    keep_seen([Row(b"three", "x")], second, first)
    for row in (TRAINED[1], Row(b"three", "x")):
        with pytest.raises(DataError, match="trained on 1 of the 1"):
            refuse_seen([row], "test", second, print)
    refuse_seen([Row(b"three", "x")], "test", first, print)


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    keep_seen(TRAINED, tmp_path)
    (tmp_path / SEEN).write_bytes((tmp_path / SEEN).read_bytes()[:-5])
    with pytest.raises(DataError, match=r"seen\.safetensors is damaged, so nothing tells which pictures"):
        refuse_seen([Row(b"three", "x")], "test", tmp_path, print)


def test_snapshots_and_means_know_what_their_run_has_seen(tmp_path: Path) -> None:
    made = captioner(
        tmp_path / "run",
        optim={"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 2},
        run={"max_steps": 4, "max_eval_samples": 2, "keep_snapshots": True},
    )
    train(made)
    snapshots = [tmp_path / "run" / "snapshots" / f"cycle-{cycle}" for cycle in (1, 2)]
    average_directories(snapshots, tmp_path / "mean")
    for directory in (*snapshots, tmp_path / "mean"):
        assert (directory / SEEN).read_bytes() == (tmp_path / "run" / SEEN).read_bytes()


@pytest.mark.parametrize("given", ["a text", ("some", "words"), ((0.5,), (1.0,)), None])
def test_only_pictures_and_clips_are_kept(tmp_path: Path, given: Any) -> None:
    """A text may well come twice in the world."""
    keep_seen(TRAINED, tmp_path)
    keep_seen([Row(given, "x")], tmp_path)
    assert not (tmp_path / SEEN).exists()
    refuse_seen([Row(given, "x"), Row(b"one", "y")], "test", tmp_path, print)


def captioner(directory: Path, **sections: Any) -> Recipe:
    encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [2, 4]}}
    model = {"architecture": "generator", "encoder": encoder, "decoder": LANGUAGE_MODEL["decoder"]}
    data = {"generated": "captions", "tokenizer": WORDS}
    sections = {"data": data, "model": model, "run": {"max_steps": 1, "max_eval_samples": 2}, **sections}
    return recipe("caption", directory, **sections)


def test_evaluate_refuses_what_its_run_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = captioner(tmp_path / "run")
    train(made)
    rows = {split: some[:20] for split, some in generate("captions").items()}
    monkeypatch.setattr("training.evaluate._rows", lambda *_: rows)
    assert evaluate(tmp_path / "run", made, "test", {})[0]["rows"] == 20
    assert evaluate(tmp_path / "run", made, "train", {})[0]["rows"] == 20
    rows["test"] = rows["train"]
    with pytest.raises(DataError, match="run was trained on 20 of the 20 inputs of the test split"):
        evaluate(tmp_path / "run", made, "test", {})
    (tmp_path / "run" / SEEN).unlink()
    capsys.readouterr()
    evaluate(tmp_path / "run", made, "test", {})
    assert "run holds no seen.safetensors, so nothing tells which pictures" in capsys.readouterr().out


def test_training_says_that_it_validates_on_what_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = generate("captions")
    train(captioner(tmp_path / "apart"))
    assert "trained on too" not in capsys.readouterr().out
    rows["validation"] = [rows["validation"][0], *rows["train"][:3]]
    monkeypatch.setattr("training.data.sources.generate", lambda _: rows)
    train(captioner(tmp_path / "mixed"))
    assert "warning: 3 of the 4 inputs of the validation split are trained on too, the first in row 2" in (
        capsys.readouterr().out
    )
