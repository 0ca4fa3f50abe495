"""Ray Tune: runs the trials of a search, several at once, and stops those that fall behind.

Each trial is an ordinary run of `train` in a directory of its own, and goes on from there when the search is begun
again. Only this file knows Ray Tune; what is tried is drawn before, by `training.space`.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import AsyncHyperBandScheduler
from rich.console import Console

from training.cluster import enter_folder, needs, ray_running
from training.directory import FINISHED
from training.reporter import Reporter
from training.run import train_as
from training.screen import screen
from training.space import Trial
from training.trials import score_of, validations
from training.workers import ALONE

# ASHA (Li et al. 2020): of the trials that have come to their 1st, 3rd, 9th ... validation, the best third goes on.
REDUCTION = 3
NO_LIMIT = 10**9  # validations: a recipe ends its run by itself


def run_trials(
    trials: Sequence[Trial], directory: Path, done: Sequence[int], at_once: int | None, min_validations: int
) -> dict[int, str]:
    """Train all but those done, whose scores count all the same. Returns what went wrong, by number of the trial.

    at_once: trials that run at a time, None for as many as there are cores. min_validations: none is stopped before.
    """
    needed = needs(trials[0].recipe)
    at_once = at_once or min(len(trials), _room(needed))
    storage = directory.absolute() / ".ray"
    shutil.rmtree(storage, ignore_errors=True)  # of an interrupted search; what counts is in the trials' directories
    asha = AsyncHyperBandScheduler(
        max_t=NO_LIMIT, grace_period=min_validations, reduction_factor=REDUCTION, metric="score", mode="max"
    )
    with ray_running(at_once, needed):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong in a trial is told in the table
        task = tune.with_parameters(_run, trials=list(trials), done=frozenset(done), folder=str(Path.cwd()))
        results = Tuner(
            tune.with_resources(task, {"cpu": needed["CPU"], "gpu": needed["GPU"]}),
            param_space={"number": tune.grid_search([trial.number for trial in trials])},
            tune_config=TuneConfig(scheduler=asha, max_concurrent_trials=at_once, reuse_actors=True),
            run_config=RunConfig(name="tune", storage_path=str(storage), verbose=0, callbacks=[_Voice()]),
        ).fit()
        failed = {
            result.config["number"]: str(getattr(result.error, "cause", None) or result.error)
            for result in results
            if result.error is not None
        }
    shutil.rmtree(storage, ignore_errors=True)
    return failed


def _run(config: dict[str, Any], trials: Sequence[Trial], done: frozenset[int], folder: str) -> None:
    """One trial, in a process of Ray's."""
    enter_folder(folder)
    trial = trials[config["number"]]
    if trial.number in done or (trial.directory / FINISHED).is_file():
        told = _Teller(trial)
        for line in validations(trial.directory):
            told.tell(line, anew=False)
        return
    train_as(ALONE, trial.recipe, lambda directory: _TrialReporter(directory, trial))


def _room(needed: Mapping[str, float]) -> int:
    """For how many trials at a time there are cores, and GPUs where they use them, on this machine."""
    rooms = [(os.cpu_count() or 1) // int(needed["CPU"])]
    if needed["GPU"]:
        rooms.append(torch.cuda.device_count() // int(needed["GPU"]))
    return max(1, min(rooms))


class _Teller:
    """Tells Ray Tune of each validation."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._best = trial, float("-inf")

    def tell(self, line: Mapping[str, Any], anew: bool = True) -> None:
        """anew: whether it was made just now. May end the thread, where the trial is to stop."""
        if "average_of" in line:  # a mean at the end is no further validation
            return
        name, value, score = score_of(self._trial.recipe, line["validation"])
        self._best = max(self._best, score)
        tune.report({"score": self._best, "step": line["step"], "name": name, "value": value, "anew": anew})


class _TrialReporter(Reporter):
    """Writes train.log in place of the screen, and tells Ray Tune of each validation."""

    def __init__(self, directory: Path, trial: Trial) -> None:
        self._text = (directory / "train.log").open("a", encoding="utf-8")
        super().__init__(directory, Console(file=self._text, highlight=False, soft_wrap=True))
        self._teller = _Teller(trial)

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self._text.close()

    def rewind(self, log_bytes: int, step: int) -> None:
        super().rewind(log_bytes, step)
        for line in validations(self._directory):  # what the run has behind it
            self._teller.tell(line, anew=False)

    def log(self, line: Mapping[str, Any]) -> int:
        end = super().log(line)
        if "validation" in line:
            self._teller.tell(line)
        return end


class _Voice(Callback):  # type: ignore[misc]
    """A line for each validation of any trial, where the command was given."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("anew"):
            number, name = result["config"]["number"], result["name"]
            screen().print(f"trial {number}: step {result['step']}, {name} {result['value']:.4g}", markup=False)
