"""Spaces and what is drawn from them: strict, repeatable, checked before anything starts."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml

from seqmodels.errors import CheckpointError, ConfigError
from tests.training.recipes import CLASSIFIER, fields
from training.parsing import parse_recipe
from training.search import search
from training.space import Distribution, draw_trials, load_space
from training.trials import score_of

RATES = "optim.learning_rate: {log_uniform: [1e-4, 1e-2]}"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.yaml", yaml.safe_dump(fields(directory=tmp_path / "search")))


def test_a_space_is_read_with_numbers_as_in_recipes(tmp_path: Path) -> None:
    space = load_space(write(tmp_path / "space.yaml", f"{RATES}\nrun.seed: {{integers: [1, 3]}}\n"))
    assert space == {
        "optim.learning_rate": Distribution("log_uniform", (1e-4, 1e-2)),
        "run.seed": Distribution("integers", (1, 3)),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["must hold keys of a recipe"]),
        ("a: [", ["space", "not YAML"]),
        ("run.seed: 3", ["run.seed is 3", "uniform, log_uniform, integers, choice"]),
        ("run.seed: {integer: [1, 3]}", ["run.seed", "integer is no distribution", "did you mean integers"]),
        ("run.seed: {integers: [1, 3.5]}", ["run.seed", "two whole numbers"]),
        ("run.seed: {integers: [3, 1]}", ["run.seed", "[3, 1]", "smaller than the second"]),
        ("model.dropout: {uniform: [0, .inf]}", ["model.dropout", "two numbers"]),
        ("model.dropout: {uniform: 0.5}", ["model.dropout", "0.5", "two numbers"]),
        ("optim.learning_rate: {log_uniform: [0, 1]}", ["optim.learning_rate", "[0, 1]", "above 0"]),
        ("run.seed: {choice: []}", ["run.seed", "list of values"]),
        ("run.threads: {choice: [1, 2]}", ["run.threads", "cannot be searched"]),
        ("run: {choice: [1, 2]}", ["run cannot be searched"]),
    ],
)
def test_a_bad_space_is_named_with_its_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_space(write(tmp_path / "space.yaml", text))
    assert all(word in str(error.value) for word in [*words, "space.yaml"]), str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.leaning_rate: {uniform: [0.1, 1]}", ["trial 0 (optim.leaning_rate=0.", "did you mean learning_rate"]),
        ("model.dropout: {uniform: [1.5, 2]}", ["trial 0 (model.dropout=1.", "dropout"]),
        ("model.encoder.recurrent.cell: {choice: [lsmt]}", ["trial 0", "lsmt"]),
    ],
)
def test_every_trial_is_checked_before_anything_starts(
    recipe: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        search(recipe, write(tmp_path / "space.yaml", text))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "search").exists()


def test_a_trial_is_a_pure_function_of_the_seed_and_its_number(recipe: Path, tmp_path: Path) -> None:
    space = load_space(write(tmp_path / "space.yaml", f"{RATES}\nmodel.dropout: {{uniform: [0, 0.5]}}\n"))
    few, many = (draw_trials(recipe, ["run.seed=9"], space, count, seed=1) for count in (3, 6))
    assert few == many[:3]
    assert len({trial.values["model.dropout"] for trial in many}) == 6
    assert draw_trials(recipe, [], space, 1, seed=2)[0].values != many[0].values
    for number, trial in enumerate(many):
        assert trial.directory == tmp_path / "search" / f"trial-{number:03d}"
        assert trial.recipe.optim.learning_rate == trial.values["optim.learning_rate"]
        assert trial.recipe.model["dropout"] == trial.values["model.dropout"] and trial.recipe.run.seed == 9


def test_settings_that_fit_together_are_drawn_together(recipe: Path, tmp_path: Path) -> None:
    """As docs/training.md has it: dropout between layers is refused where there is one."""
    both = [{"hidden_size": 8}, {"num_layers": 2, "dropout": 0.2}]
    text = json.dumps({"model.encoder.recurrent": {"choice": both}})
    trials = draw_trials(recipe, [], load_space(write(tmp_path / "space.yaml", text)), 8, seed=1)
    assert all(trial.recipe.model["encoder"]["recurrent"] in both for trial in trials)


def test_draws_keep_their_bounds_and_their_shape() -> None:
    source = random.Random(1)
    rates = sorted(Distribution("log_uniform", (1e-4, 1e-2)).draw(source) for _ in range(2001))
    assert rates[0] >= 1e-4 and rates[-1] <= 1e-2
    assert math.log10(rates[1000]) == pytest.approx(-3, abs=0.1)
    shares = sorted(Distribution("uniform", (2.0, 4.0)).draw(source) for _ in range(2001))
    assert shares[0] >= 2 and shares[-1] <= 4 and shares[1000] == pytest.approx(3, abs=0.1)
    assert {Distribution("integers", (2, 4)).draw(source) for _ in range(100)} == {2, 3, 4}
    assert {Distribution("choice", ("a", None)).draw(source) for _ in range(100)} == {"a", None}


def test_a_search_refuses_what_it_cannot_do(recipe: Path, tmp_path: Path) -> None:
    space = write(tmp_path / "space.yaml", RATES)
    with pytest.raises(ConfigError, match=r"run\.workers is 2.*remove it"):
        search(recipe, space, ["run.workers=2"])
    with pytest.raises(ConfigError, match="--trials is 0; it must be at least 1"):
        search(recipe, space, count=0)
    with pytest.raises(ConfigError, match="--at-once is 0"):
        search(recipe, space, at_once=0)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.json").write_text('{"seed": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="was begun with recipe=None"):
        search(recipe, space)
    (tmp_path / "search" / "run.json").touch()
    with pytest.raises(ConfigError, match="holds a run or a model"):
        search(recipe, space)


@pytest.mark.parametrize(
    ("kind", "scores", "expected"),
    [
        ("multi_label_classification", {"micro_f1": 0.5, "macro_f1": 0.1, "nll": 1.0}, ("micro_f1", 0.5, 0.5)),
        ("regression", {"mse": 4.0, "mae": 1.0, "nll": 1.0}, ("mse", 4.0, -4.0)),
    ],
)
def test_a_score_is_that_of_the_problem(
    kind: str, scores: dict[str, float], expected: tuple[str, float, float]
) -> None:
    made = parse_recipe(fields(model={**CLASSIFIER, "problem_type": kind}))
    assert score_of(made, scores) == expected
