"""The README keeps its word: its files exist, its recipe trains, its Python runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(*arguments: str, cwd: Path, lines: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, input=lines, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_file_map_names_files_that_exist() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for row in rows:
        folder = ""
        for name in re.findall(r"`([\w/.]+)`", row.split("|")[1]):
            folder = name.rpartition("/")[0] if "/" in name else folder
            assert (ROOT / folder / name.rpartition("/")[2]).exists(), name


def test_no_figure_is_missing() -> None:
    assert "@@" not in README


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_your_own_data_in_five_lines(tmp_path: Path) -> None:
    """The recipe as printed, on a CSV of reviews, by the commands as printed."""
    (recipe,) = blocks("yaml")
    assert len([line for line in recipe.splitlines() if not line.startswith("#")]) <= 5
    (tmp_path / "mine.yaml").write_text(recipe)
    good, bad = ("good", "fine", "great", "lovely"), ("bad", "poor", "awful", "dull")
    reviews = [f"{word} film {n},{label}" for n in range(40) for word, label in
               [(good[n % 4], "positive"), (bad[n % 4], "negative")]]  # fmt: skip
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(reviews) + "\n")
    run("training", "train", "mine.yaml", "data.tokenizer.vocab_size=300", "run.threads=1", cwd=tmp_path)
    assert "accuracy" in run("training", "evaluate", "models/mine", cwd=tmp_path)
    answer = run("seqmodels", "predict", "models/mine", cwd=tmp_path, lines="not bad at all\n")
    assert '"label": "' in answer


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "".join(blocks("python"))
    namespace: dict[str, object] = {}
    for name, golden in (("numbers-en-fr", "lstm-translator"), ("number-tags", "gru-tagger")):
        code = code.replace(f"models/{name}", str(ROOT / "tests/golden" / golden))
    exec(code, namespace)
