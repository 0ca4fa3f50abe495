"""A search: trials drawn from a space, run, compared, and the best of them kept.

search.json                what is searched; written first, never changed
trial-000/, trial-001/ ... runs of `train`; of the best, a model directory
trials.csv, report.html    at the end: what came of it
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seqmodels.errors import CheckpointError, ConfigError
from training import checkpoint
from training.config import Recipe
from training.directory import RUN, locked
from training.parsing import differences, load_recipe
from training.screen import screen
from training.space import Trial, draw_trials, load_space
from training.trials import already_done, conclude, outcome_of, show

SEARCH = "search.json"


def search(
    recipe: Path,
    space: Path,
    overrides: Sequence[str] = (),
    count: int = 10,
    seed: int = 1,
    at_once: int | None = None,
    min_validations: int = 1,
) -> None:
    """Run so many trials, going on where an earlier call was interrupted, and say which is the best.

    at_once: trials that run at a time, None for as many as there are cores. min_validations: no trial is stopped
    before. Raises ConfigError, CheckpointError; what goes wrong in a trial is told in its line, if not in all.
    """
    for name, value in (("trials", count), ("at-once", at_once), ("min-validations", min_validations)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")
    searched = load_space(space)
    base = load_recipe(recipe, overrides)
    if base.run.workers > 1:
        raise ConfigError(f"run.workers is {base.run.workers}, but a search runs several trials at once; remove it")
    directory = Path(str(base.run.output_dir))
    done = already_done(directory)
    count = max([count, *(number + 1 for number in done)])  # what is there stays
    trials = draw_trials(recipe, overrides, searched, count, seed)
    console = screen()
    with locked(directory):
        _begin(directory, base, {key: values.plain for key, values in searched.items()}, seed)
        problems: dict[int, str] = {}
        if all(trial.number in done for trial in trials):
            console.print(f"all {count} trials in {directory} are done; nothing to do", markup=False)
        else:
            _introduce(trials, done, console)
            from training.tune import run_trials

            problems = run_trials(trials, directory, sorted(done), at_once, min_validations)
        outcomes = [outcome_of(trial, problems.get(trial.number, "")) for trial in trials]
        conclude(directory, outcomes, base, searched)
        show(outcomes, console)
    if all(outcome.ended == "failed" for outcome in outcomes):
        raise ConfigError(f"all trials failed, the first with: {outcomes[0].problem}")


def _begin(directory: Path, recipe: Recipe, space: dict[str, Any], seed: int) -> None:
    """Write down what is searched, or check that it is what an earlier call has begun."""
    if (directory / RUN).exists() or (directory / "config.json").exists():
        raise ConfigError(f"run.output_dir {directory} holds a run or a model, and no search; name another directory")
    now = {"recipe": recipe.model_dump(mode="json"), "space": space, "seed": seed}
    path, text = directory / SEARCH, json.dumps(now, indent=1, default=str) + "\n"
    if not path.is_file():
        checkpoint.write_whole(path, text)
        return
    for key, was, is_now in differences(json.loads(path.read_text(encoding="utf-8")), json.loads(text)):
        raise CheckpointError(
            f"{directory} was begun with {key}={was}, but now it is {is_now}; put it back, or name another "
            "run.output_dir"
        )


def _introduce(trials: Sequence[Trial], done: dict[int, str], console: Console) -> None:
    for trial in trials:
        state = done.get(trial.number) or ("to go on" if (trial.directory / RUN).exists() else "")
        values = "  ".join(f"{key}={value!r}" for key, value in trial.values.items())
        console.print(f"trial {trial.number}: {values}{f'  ({state})' * bool(state)}", markup=False)
