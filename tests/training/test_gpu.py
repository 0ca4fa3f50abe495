"""Training on a CUDA device: as on a CPU but for rounding, float16 and its scale, and going on from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seqmodels.pretrained import load_pretrained
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TAGGER, TRANSLATOR, WORDS, recipe
from training.checkpoint import CHECKPOINTS, load_newest
from training.config import Recipe
from training.loop import FIRST_LOSS_SCALE, Trainer
from training.optim import Update
from training.run import train

pytestmark = pytest.mark.gpu

TASKS: dict[str, dict[str, Any]] = {
    "classify": {},
    "tag": {"data": {"generated": "number-tags", "tokenizer": WORDS}, "model": {**TAGGER, "crf": True}},
    "translate": {"data": {"generated": "numbers-en-fr", "tokenizer": WORDS}, "model": TRANSLATOR},
    "generate": {
        "data": {"generated": "language-model", "tokenizer": WORDS, "chunk_length": 8},
        "model": LANGUAGE_MODEL,
    },
}


def make_recipe(task: str, directory: Path, dropout: float = 0.0, **run: Any) -> Recipe:
    settings = {"max_steps": 12, "logging_steps": 1, "save_steps": 4, "eval_steps": 6, **run}
    model = TASKS[task].get("model", CLASSIFIER)
    parts = {name: {**model[name], "dropout": dropout} for name in ("encoder", "decoder") if name in model}
    return recipe(task, directory, **{**TASKS[task], "model": {**model, **parts}}, run=settings)


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("task", TASKS)
def test_a_gpu_trains_what_a_cpu_trains(task: str, tmp_path: Path) -> None:
    here = losses(train(make_recipe(task, tmp_path / "cpu")))
    there = losses(train(make_recipe(task, tmp_path / "cuda", device="cuda")))
    assert there == pytest.approx(here, rel=2e-3) and min(there) < there[0]
    assert load_pretrained(tmp_path / "cuda").config == load_pretrained(tmp_path / "cpu").config


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_train_nearly_as_32_do(task: str, dtype: str, tmp_path: Path) -> None:
    whole = losses(train(make_recipe(task, tmp_path / "whole", device="cuda")))
    half = losses(train(make_recipe(task, tmp_path / "half", device="cuda", **{dtype: True})))
    assert half == pytest.approx(whole, rel=3e-2) and half != whole


def test_an_overflow_in_float16_halves_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = FIRST_LOSS_SCALE * 2.0**20  # gradients of the loss are beyond 65,504
    monkeypatch.setattr("training.loop.FIRST_LOSS_SCALE", scale)
    done: list[Update] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda trainer: done.append(step(trainer)) or done[-1])  # type: ignore[func-returns-value]
    train(make_recipe("translate", tmp_path, device="cuda", fp16=True, max_steps=30))
    skipped = [one.skipped for one in done]
    assert skipped[0] and not skipped[-1], "the scale fell until the gradients fitted"
    saved = load_newest(tmp_path / CHECKPOINTS)
    assert saved is not None and saved[0].loss_scale == scale / 2 ** sum(skipped)


@pytest.mark.parametrize("task", TASKS)
def test_going_on_gives_what_a_run_left_alone_gives(task: str, tmp_path: Path, train_until: TrainUntil) -> None:
    settings: dict[str, Any] = {"device": "cuda", "bf16": True, "ema_decay": 0.9, "dropout": 0.3}
    train(make_recipe(task, tmp_path / "whole", **settings))
    train_until(make_recipe(task, tmp_path / "cut", **settings), 7)
    assert sorted(path.name for path in (tmp_path / "cut" / CHECKPOINTS).iterdir())[-1].endswith("6-validated")
    train(make_recipe(task, tmp_path / "cut", **settings))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()
