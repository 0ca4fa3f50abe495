"""Ctrl-C: a step is done whole and saved, a second one ends at once, and the end is that of a run left alone."""

import os
import signal
from pathlib import Path

import pytest

from tests.training.recipes import recipe
from training.interrupts import interrupts_wait
from training.loop import Trainer
from training.optim import Update
from training.run import train

RUN = {"max_steps": 6, "eval_steps": 3, "logging_steps": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_is_saved_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """At step 4, which is logged there, and would neither be validated nor saved."""
    step, steps = Trainer._step, []

    def interrupted(trainer: Trainer) -> Update:
        if trainer.progress.step == 3:
            os.kill(os.getpid(), number)
        return step(trainer)

    def counted(trainer: Trainer) -> Update:
        steps.append(trainer.progress.step)
        return step(trainer)

    train(recipe(directory=tmp_path / "whole", run=RUN))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(directory=tmp_path / "cut", run=RUN))
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())[-1] == "step-00000004"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        train(recipe(directory=tmp_path / "cut", run=RUN))
    assert steps == [4, 5]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_wait() as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) == before
