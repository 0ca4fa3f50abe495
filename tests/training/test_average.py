"""The mean of weights: by hand in float64, of runs that were interrupted as of others, and of what belongs together."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.models import build_model
from seqmodels.pretrained import load_pretrained
from tests.training.recipes import WORDS, recipe
from training.__main__ import main
from training.average import averaged, mean_model
from training.run import train


def test_the_mean_is_that_of_float64_and_counts_are_the_firsts() -> None:
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        backbone = {"image_size": [8, 8], "channels": [2, 4]}
        config = {"architecture": "classifier", "encoder": {"input": "image", "backbone": backbone}}
        model = build_model(ModelConfig.parse({**config, "labels": ["a", "b"]}))
        model.train()
        for _ in range(seed + 1):  # so that running statistics and their counts differ
            model(inputs=torch.randn(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.int64))
        models.append(model)
    mean = mean_model(models).state_dict()
    counts = 0
    for name, value in mean.items():
        values = [model.state_dict()[name] for model in models]
        if value.is_floating_point():
            assert torch.equal(value, torch.stack(values).double().mean(0).float()), name
        else:
            counts += 1
            assert torch.equal(value, values[0])
    assert counts, "batch normalisation counts its batches"
    assert not torch.equal(mean["head.weight"], models[0].state_dict()["head.weight"])


def run_of(directory: Path, **run: Any) -> Path:
    return train(recipe(directory=directory, run={"max_steps": 12, "eval_steps": 2, **run}))


def validated(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "validation" in line]


@pytest.mark.parametrize(("field", "steps"), [("average_last", [8, 10, 12]), ("average_best", None)])
def test_a_run_ends_with_the_mean_of_its_last_or_best_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, steps: list[int] | None
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr("training.loop.averaged", lambda paths: kept.extend(paths) or averaged(paths))
    run_of(tmp_path, **{field: 3})
    *singles, last = validated(tmp_path)
    if steps is None:
        best = sorted(singles, key=lambda line: (line["validation"]["accuracy"], line["step"]))[-3:]
        steps = sorted(line["step"] for line in best)
    assert last["average_of"] == steps
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in steps]
    # The result is the better one of the mean and the best of all, by its own scores.
    ranks = [(line["validation"]["accuracy"], -line["validation"]["nll"]) for line in [*singles, last]]
    assert last["best"] == (ranks[-1] > max(ranks[:-1]))
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished["validation"] == [line for line in [*singles, last] if line["best"]][-1]["validation"]


@pytest.mark.parametrize("better", [True, False])
def test_the_mean_is_the_result_only_where_it_scores_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    means = []

    def score(candidate: Path) -> dict[str, float]:
        if candidate.name == "average":
            means.append(load_pretrained(candidate).model.state_dict())
        (candidate / "shown.json").write_text('{"samples": [], "confusion": {}}')
        return {"accuracy": 0.9 if better and candidate.name == "average" else 0.5, "nll": 1.0}

    monkeypatch.setattr("training.run._validate", lambda recipe, codec, rows, candidate: score(candidate))
    run_of(tmp_path, average_last=2)
    result = load_pretrained(tmp_path).model.state_dict()
    assert all(torch.equal(result[name], means[0][name]) for name in result) == better
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("the mean of 2 validated ones" in card) == better


def test_a_run_that_was_stopped_averages_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_of(whole, average_best=3)
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.averaged", lambda paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_of(stopped, average_best=3)
    run_of(stopped, average_best=3)
    assert (whole / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    assert load_pretrained(whole).revision == load_pretrained(stopped).revision


def test_the_command_averages_snapshots_and_the_mean_is_evaluated_like_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = {"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 2}
    run = {"max_steps": 8, "keep_snapshots": True}
    train(recipe(directory=tmp_path / "run", optim=optim, run=run))
    first, second = (str(tmp_path / "run" / "snapshots" / f"cycle-{cycle}") for cycle in (1, 2))
    assert main(["average", first, second, "--output", str(tmp_path / "mean")]) == 0
    weights = [load_pretrained(path).model.state_dict() for path in (first, second, tmp_path / "mean")]
    for name, value in weights[2].items():
        assert torch.equal(value, ((weights[0][name].double() + weights[1][name].double()) / 2).float())
    assert "calibrate" not in capsys.readouterr().out
    config = load_pretrained(Path(first)).config.model_copy(update={"temperature": 1.5})
    config.save(Path(first) / "config.json")
    assert main(["average", first, second, "--output", str(tmp_path / "again")]) == 0
    assert "and the mean is not: calibrate it" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "again").config.temperature == 1.0
    assert main(["evaluate", str(tmp_path / "mean"), "--split", "validation"]) == 0
    assert main(["evaluate", first, "--split", "validation"]) == 0
    capsys.readouterr()
    assert main(["average", first, second, "--output", str(tmp_path / "mean")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["average", first, "--output", str(tmp_path / "other")]) == 2
    assert "two or more" in capsys.readouterr().err


def test_models_that_differ_in_more_than_their_weights_have_no_mean(tmp_path: Path) -> None:
    run_of(tmp_path / "a")
    train(recipe(directory=tmp_path / "b", model={**recipe().model, "dropout": 0.5}))
    with pytest.raises(ConfigError, match=r"differ in config\.json \(dropout is 0\.0 and 0\.5\), so their weights"):
        averaged([tmp_path / "a", tmp_path / "b"])


def test_the_mean_of_runs_on_the_same_rows_can_tell_what_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By run.json; and no run begins in its directory."""
    lines = [f"a {word} film number {n},{word}" for n in range(20) for word in ("good", "bad")]
    (tmp_path / "films.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    columns = {"input": "text", "target": "label"}

    def run_on(name: str, cut_seed: int, **run: Any) -> str:
        data = {"path": str(tmp_path / "films.csv"), "columns": columns, "tokenizer": WORDS}
        cut = {"validation": 4, "test": 6, "seed": cut_seed}
        return str(train(recipe(directory=tmp_path / name, data={**data, "cut": cut}, run=run)))

    one, two = (run_on(name, 1, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    assert main(["average", one, two, "--output", str(tmp_path / "mean")]) == 0
    assert (tmp_path / "mean" / "run.json").read_bytes() == (tmp_path / "a" / "run.json").read_bytes()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "mean")]) == 0
    assert "nothing tells" not in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "mean"), "data.cut.test=8"]) == 2
    assert "may have been trained on" in capsys.readouterr().err
    weights = (tmp_path / "mean" / "model.safetensors").read_bytes()
    run_on("mean", 1, seed=1)
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert (tmp_path / "mean" / "model.safetensors").read_bytes() == weights
    (tmp_path / "b" / "run.json").write_text(
        (tmp_path / "a" / "run.json").read_text().replace('"data": "', '"data": "x')
    )
    assert main(["average", one, two, "--output", str(tmp_path / "unlike")]) == 0
    assert not (tmp_path / "unlike" / "run.json").exists() and not (tmp_path / "unlike" / "finished.json").exists()
    (tmp_path / "b" / "run.json").write_text("{")
    assert main(["average", one, two, "--output", str(tmp_path / "unread")]) == 0
    assert not (tmp_path / "unread" / "run.json").exists()


def test_a_mean_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path / "a")
    command = ["average", str(tmp_path / "a"), str(tmp_path / "a"), "--output", str(tmp_path / "mean")]
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.average.shutil.copyfile", full)
        assert main(command) == 2
    assert capsys.readouterr().err == "error: the disk is full; make room and give the command again\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / ".mean.writing").mkdir()  # as of a call that was killed
    assert main(command) == 0
    assert load_pretrained(tmp_path / "mean").revision == load_pretrained(tmp_path / "a").revision
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "mean"])
