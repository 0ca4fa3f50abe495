"""recipes.digits: what it writes is what its recipe reads, and both orders show the same pictures."""

import json
import random
from pathlib import Path

import pytest

from recipes.digits import ORDERS, main, write
from training.parsing import load_recipe
from training.run import train

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "digits.yaml"


def test_the_recipe_reads_what_is_written(tmp_path: Path) -> None:
    source = random.Random(0)
    pictures = [[source.random() for _ in range(64)] for _ in range(60)]
    labels = [i % 10 for i in range(60)]
    write(tmp_path, pictures, labels)
    files = {name: (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ORDERS}
    for row, one, two in zip(range(60), *(map(json.loads, files[name]) for name in ORDERS), strict=True):
        assert one == {"pixels": [[pixel] for pixel in pictures[row]], "label": str(labels[row])}
        assert two["label"] == one["label"] and two["pixels"] != one["pixels"]
        assert [two["pixels"][ORDERS["permuted"].index(place)] for place in range(64)] == one["pixels"]
    overrides = [f"data.path={tmp_path / 'permuted.jsonl'}", f"run.output_dir={tmp_path / 'run'}"]
    train(load_recipe(RECIPE, [*overrides, "run.num_train_epochs=null", "run.max_steps=2", "optim.warmup_steps=0"]))
    assert (tmp_path / "run" / "config.json").is_file()


def test_without_a_folder_it_tells_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in (([], 2), (["--help"], 0), (["one", "two"], 2)):
        monkeypatch.setattr("sys.argv", ["digits", *arguments])
        assert main() == status
        assert "python -m recipes.digits FOLDER" in capsys.readouterr().out
