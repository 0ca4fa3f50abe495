"""Ctrl-C: a step is done whole and saved, a second one ends at once, and the end is that of a run left alone."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.training.kill_storm import outcome
from tests.training.recipes import fields, recipe
from training.interrupts import interrupts_wait, termination_interrupts
from training.loop import Trainer
from training.optim import Update
from training.run import train
from training.screen import _Output

RUN = {"max_steps": 6, "eval_steps": 3, "logging_steps": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


@pytest.fixture(autouse=True)
def _hangup() -> Iterator[None]:
    """Not ignored, as by nohup, and not after a test either."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_counts_once() -> None:
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        with interrupts_wait() as came:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # while what was under way is saved
        assert came.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")


def test_a_terminal_that_is_really_closed(tmp_path: Path) -> None:
    """Nothing of what was trained is lost, with a bar that can no longer be drawn."""
    ours, theirs = pty.openpty()
    training = subprocess.Popen(
        endless_training(tmp_path, eval_steps=10**6),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    try:
        os.close(theirs)
        said = b""
        while b"loss" not in said:
            said += os.read(ours, 10_000)
        os.close(ours)
        training.wait(60)  # with which status nobody is left to ask
    finally:
        training.kill()
    assert newest(tmp_path / "run") > "step-00000000"


def endless_training(path: Path, eval_steps: int) -> list[str]:
    """A command that trains in `path`/run and saves nothing of its own accord but at validations."""
    run = {"max_steps": 10**6, "eval_steps": eval_steps, "save_steps": 10**6, "output_dir": str(path / "run")}
    (path / "recipe.yaml").write_text(yaml.safe_dump(fields(run=run)), encoding="utf-8")
    return [sys.executable, "-m", "training", "train", str(path / "recipe.yaml")]


def test_a_reader_that_leaves_is_an_interrupt(tmp_path: Path) -> None:
    command = endless_training(tmp_path, eval_steps=5)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        assert training.stdout and training.stderr
        assert any("step 5: validation" in line for line in training.stdout)
        training.stdout.close()  # as `| head` does
        try:
            assert training.wait(60) == 130
        finally:
            training.kill()
        assert training.stderr.read().endswith("interrupted; the same command goes on where it stopped\n")
    assert newest(tmp_path / "run") > "step-00000005"  # that one was saved at its validation


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
def test_a_full_disk_of_the_output_is_told_as_that(tmp_path: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = endless_training(tmp_path, eval_steps=5)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False, text=True)
    *_, first, last = done.stderr.splitlines()
    assert first == "standard output cannot be written: No space left on device"
    assert last.startswith("interrupted") and done.returncode == 130


def test_what_both_outputs_refuse_is_saved_all_the_same(tmp_path: Path) -> None:
    """As of `2>&1 | head`."""
    with subprocess.Popen(
        endless_training(tmp_path, eval_steps=5), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as training:
        assert training.stdout and any("step 5: validation" in line for line in training.stdout)
        training.stdout.close()
        try:
            assert training.wait(60) == 130
        finally:
            training.kill()
    assert newest(tmp_path / "run") > "step-00000005"


def test_an_interrupt_of_another_thread_wakes_who_waits() -> None:
    """The words of several workers come by a thread."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w", encoding="ascii", buffering=1) as stream:
        writing = threading.Timer(0.1, lambda: print("x", file=_Output(stream)))  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            writing.start()
            time.sleep(20)
    assert time.monotonic() - began < 10


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
