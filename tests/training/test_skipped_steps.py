"""Steps that are skipped, where loss or gradient is not finite: what they leave alone, when they end a run, and how
float16's loss scale follows them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.loop
from tests.training.recipes import recipe
from tests.training.test_loop import log_of
from training import checkpoint
from training.loop import MAX_LOSS_SCALE, MAX_SKIPPED_IN_A_ROW, MIN_LOSS_SCALE, Trainer
from training.optim import DivergedError, Precision, Update, update
from training.run import train


def without_16_bits(precisions: list[Precision]) -> Callable[..., Update]:
    """`update` in float32, which notes the precisions that were asked for."""

    def noted(*given: Any, precision: Precision, **others: Any) -> Update:
        precisions.append(precision)
        return update(*given, **others)

    return noted


class PlantedLoss:
    """Makes the loss of the given steps infinite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        trainer_step = Trainer._step
        self.weights: dict[int, list[torch.Tensor]] = {}

        def step(trainer: Trainer) -> Any:
            self.weights[trainer.progress.step] = [p.detach().clone() for p in trainer.model.parameters()]
            forward = trainer.model.forward
            if trainer.progress.step in steps:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(trainer.model, "forward", lambda **batch: _infinite(forward(**batch)))
                    return trainer_step(trainer)
            return trainer_step(trainer)

        monkeypatch.setattr(Trainer, "_step", step)


def _infinite(out: Any) -> Any:
    return type(out)(out.loss * math.inf, out.nll, out.num_targets, out.logits, out.state)


def test_what_is_scattered_does_not_end_a_run_and_averages_know_only_good_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    move = Trainer._move_average

    def noted(trainer: Trainer) -> None:
        moved.append(trainer.progress.step)
        move(trainer)

    monkeypatch.setattr(Trainer, "_move_average", noted)
    PlantedLoss(monkeypatch, {1, 3, 5, 7, 9})
    train(recipe(directory=tmp_path, run={"max_steps": 11, "ema_decay": 0.9}))
    assert moved == [1, 3, 5, 7, 9, 11], "steps done so far: the bad ones are the second, the fourth ..."


def test_a_loss_scale_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the lower one, what is not finite is the loss's own fault, and ends the run."""
    monkeypatch.setattr(training.loop, "update", without_16_bits([]))
    monkeypatch.setattr(training.loop, "STEPS_OF_A_SCALE", 1)
    monkeypatch.setattr(training.loop, "FIRST_LOSS_SCALE", MAX_LOSS_SCALE / 2)
    fp16 = {"fp16": True}
    made = recipe(directory=tmp_path / "high", run={"max_steps": 4, "save_steps": 4})
    train(made.model_copy(update={"run": made.run.model_copy(update=fp16)}))
    found = checkpoint.load_newest(tmp_path / "high" / "checkpoints")
    assert found is not None and found[0].loss_scale == MAX_LOSS_SCALE
    monkeypatch.setattr(training.loop, "FIRST_LOSS_SCALE", MIN_LOSS_SCALE)
    PlantedLoss(monkeypatch, set(range(MAX_SKIPPED_IN_A_ROW)))
    made = recipe(directory=tmp_path / "low", run={"max_steps": 20})
    with pytest.raises(DivergedError, match="5 steps in a row"):
        train(made.model_copy(update={"run": made.run.model_copy(update=fp16)}))


def test_a_planted_infinite_loss_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = PlantedLoss(monkeypatch, {2, 5})
    train(recipe(directory=tmp_path, run={"max_steps": 8, "logging_steps": 1}))
    same = [
        all(torch.equal(a, b) for a, b in zip(planted.weights[step], planted.weights[step + 1], strict=True))
        for step in range(7)
    ]
    assert same == [step in (2, 5) for step in range(7)]
    assert [line["skipped"] for line in log_of(tmp_path) if "learning_rate" in line] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert "| Steps skipped (loss or gradient not finite) | 2 |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_several_in_a_row_end_the_run_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PlantedLoss(monkeypatch, set(range(3, 3 + MAX_SKIPPED_IN_A_ROW)))
    with pytest.raises(DivergedError, match=r"step 8; lower optim\.learning_rate"):
        train(recipe(directory=tmp_path, run={"max_steps": 20}))


def test_a_loss_scale_falls_where_it_overflows_and_rises_after_long_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 needs a GPU; its scale is a rule about skipped steps, which another cause of skipping shows as well."""
    monkeypatch.setattr(training.loop, "STEPS_OF_A_SCALE", 4)
    precisions: list[Precision] = []
    monkeypatch.setattr(training.loop, "update", without_16_bits(precisions))
    PlantedLoss(monkeypatch, {0, 1, 2, 3, 4, 5, 6})  # more than MAX_SKIPPED_IN_A_ROW
    made = recipe(directory=tmp_path, run={"max_steps": 17})
    train(made.model_copy(update={"run": made.run.model_copy(update={"fp16": True})}))
    scales = [2.0**power for power in (4, 3, 2, 1, 0, -1, -2, *[-3] * 4, *[-2] * 4, *[-1] * 2)]
    assert precisions == [Precision(torch.float16, scale) for scale in scales]
    assert "(loss or gradient not finite) | 0 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
