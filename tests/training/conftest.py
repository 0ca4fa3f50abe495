"""What tests of training share: a run that ends early, and one small Ray, since starting it takes seconds."""

import logging
import os
from collections.abc import Callable, Iterator

import pytest

from training.config import Recipe
from training.loop import Trainer
from training.optim import Update
from training.run import train

TrainUntil = Callable[[Recipe, int], None]


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> TrainUntil:
    """Train until a run is killed before its update of a step: nothing is saved that was not saved already."""
    original = Trainer._step

    def train_until(recipe: Recipe, step: int) -> None:
        def killed(trainer: Trainer) -> Update:
            if trainer.progress.step == step:
                raise KeyboardInterrupt
            return original(trainer)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "_step", killed)
            train(recipe)

    return train_until


@pytest.fixture(scope="package")
def small_ray() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray

    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", object_store_memory=128 * 1024**2, _node_ip_address="127.0.0.1", **options)
    yield
    ray.shutdown()
