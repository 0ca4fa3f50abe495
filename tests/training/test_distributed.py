"""Ray Train: a run that loses a worker, or is interrupted, ends with the bits of one that went through."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from seqmodels.errors import ConfigError, DataError
from tests.training import together
from tests.training.kill_storm import outcome
from tests.training.recipes import LANGUAGE_MODEL, WORDS, fields, recipe, write_rows
from training.checkpoint import saved_checkpoints
from training.data.generated import generate
from training.distributed import WorkersLostError, _fit, _NoSecondTry
from training.parsing import parse_recipe
from training.run import train

LOSSY = {**LANGUAGE_MODEL["decoder"], "dropout": 0.2, "embedding_dropout": 0.1}


def language_model(directory: Path) -> dict[str, Any]:
    """With carried state and dropout, so that both must come back for each worker."""
    data = {"path": str(directory.parent / "rows.csv"), "columns": {"target": "target"}, "cut": {"validation": 20}}
    return fields(
        "generate",
        directory,
        data={**data, "tokenizer": WORDS, "chunk_length": 8},
        model={**LANGUAGE_MODEL, "decoder": LOSSY},
        run={"workers": 2, "rows_per_batch": 5, "max_steps": 600, "save_steps": 10, "eval_steps": 300},
    )


def workers() -> list[int]:
    """The processes of Ray's workers that descend from this one."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in found if b"RayTrainWorker" in _read(pid, "cmdline") and _is_ours(pid)]


def _is_ours(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        stat = _read(pid, "stat").rpartition(b")")[2].split()
        pid = int(stat[1]) if stat else 0
    return pid == os.getpid()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


def strike(directory: Path, step: int, blow: Callable[[], None]) -> threading.Thread:
    """Once the run has saved at the step or later."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(int(path.name[5:13]) >= step for path in saved_checkpoints(directory / "checkpoints")):
                blow()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_that_loses_a_worker_ends_with_the_same_bits(
    tmp_path: Path, small_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.csv", generate("language-model")["train"][:200])
    together.start(language_model(tmp_path / "alone"))
    made = parse_recipe(language_model(tmp_path / "struck"))

    killed: list[int] = []

    def kill_one() -> None:
        killed.append(workers()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = strike(tmp_path / "struck", 100, kill_one)
    assert train(made) == tmp_path / "struck"
    killer.join()
    assert killed and killed[0] not in workers()
    said = capsys.readouterr().out
    assert said.count("training the word tokenizer") == 1 and said.count("going on from step") == 1
    assert "the best model, of step" in said.splitlines()[-1]
    assert outcome(tmp_path / "struck") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_an_interrupted_run_leaves_nobody_behind_and_goes_on(tmp_path: Path, small_ray: None) -> None:
    write_rows(tmp_path / "rows.csv", generate("language-model")["train"][:200])
    together.start(language_model(tmp_path / "alone"))
    made = parse_recipe(language_model(tmp_path / "struck"))
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    interrupter = strike(tmp_path / "struck", 100, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(made)
    interrupter.join()
    assert not workers()
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "struck" / "finished.json").exists()
    train(made)
    assert outcome(tmp_path / "struck") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_the_users_mistakes_are_told_once_and_not_tried_again(
    tmp_path: Path, small_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the workers look, too
    write_rows(tmp_path / "rows.csv", generate("language-model")["train"][:3])
    made = language_model(tmp_path / "run")
    made["data"] |= {"path": "rows.csv", "splits": {"train": "training"}}
    began = time.monotonic()
    with pytest.raises(DataError, match="training"):
        train(parse_recipe(made))
    assert time.monotonic() - began < 40
    assert not workers()


class Ending:
    """A trainer that ends in an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fit(self) -> None:
        raise self.error


def test_what_ends_a_run_of_workers_is_what_would_end_it_alone() -> None:
    """The rules that the slow tests see at work; those take as long as Ray needs to start workers."""
    mistake, death = DataError("no column"), ActorDiedError()
    with pytest.raises(DataError, match="no column"):
        _NoSecondTry().after_exception(None, {0: RuntimeError("connection closed"), 1: mistake})
    _NoSecondTry().after_exception(None, {0: death})  # Ray is to begin again
    for error, expected in (
        (ControllerError(mistake), DataError),
        (WorkerGroupError("", {0: RuntimeError(), 1: death}), WorkersLostError),
        (WorkerGroupError("", {0: RuntimeError()}), WorkerGroupError),  # a mistake of ours
        (SystemExit(0), KeyboardInterrupt),
    ):
        with pytest.raises(expected):
            _fit(Ending(error))


def test_too_few_processors_are_an_error_and_no_wait(tmp_path: Path, small_ray: None) -> None:
    with pytest.raises(ConfigError, match=r"2 processes need 10 CPUs, but Ray has 2; .* run\.threads"):
        train(recipe(directory=tmp_path, run={"workers": 2, "threads": 5}))
    with pytest.raises(ConfigError, match=r"2 processes need 2 GPUs, but Ray has 0; .* run\.device"):
        train(recipe(directory=tmp_path, run={"workers": 2, "device": "cuda"}))
