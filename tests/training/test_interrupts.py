"""Ctrl-C: a step is done whole and saved, a second one ends at once, and the end is that of a run left alone."""

import os
import signal
from pathlib import Path

import pytest

from tests.training.kill_storm import outcome
from tests.training.recipes import recipe
from training.interrupts import interrupts_wait
from training.loop import Trainer
from training.optim import Update
from training.run import train

RUN = {"max_steps": 6, "eval_steps": 3, "logging_steps": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 3, 5])  # after which it is to be validated, to be nothing, and to end
def test_what_is_interrupted_is_saved_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int
) -> None:
    original, steps = Trainer._step, []

    def interrupted(trainer: Trainer) -> Update:
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return original(trainer)

    def counted(trainer: Trainer) -> Update:
        steps.append(trainer.progress.step)
        return original(trainer)

    train(recipe(directory=tmp_path / "whole", run=RUN))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(directory=tmp_path / "cut", run=RUN))
    assert newest(tmp_path / "cut") == f"step-{step + 1:08d}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        train(recipe(directory=tmp_path / "cut", run=RUN))
    assert steps == list(range(step + 1, 6))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_validation_that_is_interrupted_leaves_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    train(recipe(directory=tmp_path / "whole", run=RUN))
    with monkeypatch.context() as patch:
        patch.setattr("training.run._validate", lambda *_: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(directory=tmp_path / "cut", run=RUN))
    assert newest(tmp_path / "cut") == "step-00000003"
    train(recipe(directory=tmp_path / "cut", run=RUN))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def newest(directory: Path) -> str:
    return max(path.name for path in (directory / "checkpoints").iterdir())


def test_what_a_shell_has_told_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_wait() as came:
            os.kill(os.getpid(), signal.SIGINT)
            assert not came.is_set()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_wait() as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) == before
