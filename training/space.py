"""What a search tries: distributions over keys of a recipe, read from YAML, and the trials that are drawn from them.

    optim.learning_rate: {log_uniform: [1e-4, 1e-2]}
    model.encoder.recurrent.hidden_size: {integers: [32, 128]}
    model.encoder.recurrent.cell: {choice: [gru, lstm]}

A trial is the recipe with some overrides, as on the command line of `train`, so that any of them can be repeated there.
Knows recipes; knows no Ray.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqmodels.config import suggestion
from seqmodels.errors import ConfigError
from seqmodels.yaml_files import read_yaml
from training.config import Recipe
from training.parsing import load_recipe

KINDS = ("uniform", "log_uniform", "integers", "choice")
# What must be alike for trials to be compared, and what the search itself decides.
FIXED = ("task", "run.metric_for_best_model", "run.workers", "run.threads", "run.device", "run.output_dir")


@dataclass(frozen=True)
class Distribution:
    """kind: uniform or log_uniform between two numbers, integers from one to another, both included, or a choice."""

    kind: str
    values: tuple[Any, ...]

    @property
    def plain(self) -> dict[str, list[Any]]:
        """As it stands in the file."""
        return {self.kind: list(self.values)}

    def draw(self, source: random.Random) -> Any:
        match self.kind:
            case "uniform":
                return source.uniform(*self.values)
            case "log_uniform":
                low, high = self.values
                return min(high, max(low, math.exp(source.uniform(math.log(low), math.log(high)))))
            case "integers":
                return source.randint(*self.values)
        return source.choice(self.values)


Space = dict[str, Distribution]


@dataclass(frozen=True)
class Trial:
    """number: from 0. values: what was drawn, by key. recipe: complete."""

    number: int
    values: dict[str, Any]
    recipe: Recipe

    @property
    def directory(self) -> Path:
        assert self.recipe.run.output_dir is not None
        return Path(self.recipe.run.output_dir)


def load_space(path: Path) -> Space:
    """Raises ConfigError that names the key, what it holds and what is allowed."""
    fields = read_yaml(path, "space")
    if not isinstance(fields, dict) or not fields:
        raise ConfigError(f"space {path} must hold keys of a recipe, such as optim.learning_rate: {{uniform: [0, 1]}}")
    return {str(key): _distribution(f"space {path}: {key}", str(key), value) for key, value in fields.items()}


def _distribution(where: str, key: str, value: Any) -> Distribution:
    if any(f"{fixed}.".startswith(f"{key}.") for fixed in FIXED):
        raise ConfigError(f"{where} cannot be searched; set it in the recipe")
    if not isinstance(value, dict) or len(value) != 1:
        raise ConfigError(f"{where} is {value!r}, but must be one of {', '.join(KINDS)}, such as {{choice: [1, 2]}}")
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise ConfigError(f"{where}: {kind} is no distribution{suggestion(str(kind), KINDS)}")
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: choice is {values!r}, but must be a list of values")
        return Distribution(kind, tuple(values))
    number = int if kind == "integers" else (int, float)
    if not (isinstance(values, list) and len(values) == 2 and all(_is_finite(value, number) for value in values)):
        raise ConfigError(f"{where}: {kind} is {values!r}, but must be two {'whole ' * (number is int)}numbers")
    low, high = values
    if low >= high or (kind == "log_uniform" and low <= 0):
        above = " and above 0" * (kind == "log_uniform")
        raise ConfigError(f"{where}: {kind} is {values!r}, but the first number must be smaller than the second{above}")
    return Distribution(kind, (low, high))


def _is_finite(value: Any, number: Any) -> bool:
    return isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)


def draw_trials(path: Path, overrides: Sequence[str], space: Space, count: int, seed: int) -> list[Trial]:
    """So many trials of a recipe, each a pure function of the seed and its number, and checked as `train` would.

    Raises ConfigError that names the trial's values.
    """
    directory, trials = load_recipe(path, overrides).run.output_dir, []
    for number in range(count):
        source = random.Random(f"{seed}:{number}")
        values = {key: distribution.draw(source) for key, distribution in space.items()}
        drawn = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
        where = f"run.output_dir={json.dumps(f'{directory}/trial-{number:03d}')}"
        try:
            trials.append(Trial(number, values, load_recipe(path, [*overrides, *drawn, where])))
        except ConfigError as error:
            raise ConfigError(f"trial {number} ({' '.join(drawn)}): {error}") from None
    return trials
