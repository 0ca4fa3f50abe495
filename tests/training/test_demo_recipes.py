"""Every demo recipe learns: its loss falls within 20 steps."""

import json
from pathlib import Path

import pytest

from training.parsing import load_recipe
from training.run import train

DEMO = sorted((Path(__file__).parent.parent.parent / "recipes" / "demo").glob("*.yaml"))


@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.stem)
def test_a_demo_recipe_lowers_its_loss_within_20_steps(path: Path, tmp_path: Path) -> None:
    overrides = ["run.max_steps=20", "run.logging_steps=5", "run.eval_steps=20", "run.max_eval_samples=8"]
    overrides += ["run.threads=1", "optim.warmup_steps=0", f"run.output_dir={tmp_path}"]
    train(load_recipe(path, overrides))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0], losses
