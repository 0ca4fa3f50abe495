"""python -m training: your own files end to end, help, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqmodels.pipeline import Pipeline
from tests.training.recipes import TAGGER, TRANSLATOR, WORDS, fields
from training.__main__ import main
from training.data.generated import generate

ROOT = Path(__file__).parent.parent.parent


def write_recipe(path: Path, **sections: object) -> str:
    made = fields(str(sections.pop("task", "classify")), **sections)
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return str(path)


def train_and_evaluate(recipe: str, directory: Path, *overrides: str) -> dict[str, float]:
    assert main(["train", recipe, f"run.output_dir={directory}", *overrides]) == 0
    assert main(["evaluate", str(directory), "--split", "validation"]) == 0
    scores: dict[str, float] = json.loads((directory / "evaluation-validation.json").read_text())["scores"]
    return scores


def test_own_csv_of_labels(tmp_path: Path) -> None:
    rows = generate("sentiment")["train"][:1500]
    lines = [f'"{row.input}",{row.target}' for row in rows]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    data = {
        "path": str(tmp_path / "reviews.csv"),
        "columns": {"input": "text", "target": "label"},
        "cut": {"validation": 0.1},
        "tokenizer": WORDS,
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", data=data, optim={"learning_rate": 0.02})
    scores = train_and_evaluate(recipe, tmp_path / "model", "run.max_steps=150", "run.rows_per_batch=32")
    assert scores["accuracy"] > 0.9
    answer = Pipeline.from_pretrained(tmp_path / "model")(["the film was not dull but brilliant ."])[0]
    assert answer["label"] == "positive"


@pytest.mark.parametrize("form", ["jsonl", "columns"])
def test_own_tags_as_json_lines_or_columns(tmp_path: Path, form: str) -> None:
    rows = generate("number-tags")["train"][:600]
    if form == "jsonl":
        path = tmp_path / "tags.jsonl"
        lines = [json.dumps({"words": row.input, "tags": row.target}) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        columns = {"input": "words", "target": "tags"}
    else:
        path = tmp_path / "tags.txt"
        blocks = ["\n".join(f"{w} {t}" for w, t in zip(row.input or (), row.target, strict=True)) for row in rows]
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
        columns = {"input": "column0", "target": "column1"}
    data = {"path": str(path), "columns": columns, "cut": {"validation": 60}, "tokenizer": WORDS}
    recipe = write_recipe(tmp_path / "recipe.yaml", task="tag", data=data, model=TAGGER, optim={"learning_rate": 0.02})
    scores = train_and_evaluate(recipe, tmp_path / "model", "run.max_steps=200", "run.rows_per_batch=32")
    assert scores["accuracy"] > 0.9 and scores["span_f1"] > 0.6


def test_own_csv_of_pairs(tmp_path: Path) -> None:
    for name, pairs in (("train", 400), ("validation", 20)):
        lines = [f"{_letters(n)},{_letters(n).upper()}" for n in range(pairs)]
        (tmp_path / f"{name}.csv").write_text("lower,upper\n" + "\n".join(lines) + "\n", encoding="utf-8")
    data = {"path": str(tmp_path), "columns": {"input": "lower", "target": "upper"}, "tokenizer": {"kind": "character"}}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        task="translate",
        data=data,
        model=TRANSLATOR,
        optim={"learning_rate": 0.02},
        generation={"num_beams": 2, "max_new_tokens": 8},
    )
    scores = train_and_evaluate(recipe, tmp_path / "model", "run.max_steps=150", "run.rows_per_batch=32")
    assert scores["exact_match"] > 0.5, scores


def _letters(number: int) -> str:
    return "".join("abcde"[(number // 5**place) % 5] for place in range(4))


def test_evaluate_takes_search_options_and_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert main(["train", recipe, f"run.output_dir={tmp_path / 'model'}"]) == 0
    assert main(["evaluate", str(tmp_path / "model"), "--baseline"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["split"] == "test" and result["rows"] == 1000
    assert result["scores"]["bag_of_words_baseline"] <= 0.75
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    recipe = write_recipe(tmp_path / "recipe.yaml", task="translate", data=data, model=TRANSLATOR)
    run = [f"run.output_dir={tmp_path / 'translator'}", "run.max_eval_samples=4", "generation.max_new_tokens=3"]
    assert main(["train", recipe, *run]) == 0
    assert main(["evaluate", str(tmp_path / "translator"), "generation.num_beams=3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["search"] == {"max_new_tokens": 3, "num_beams": 3}
    assert "tok:13a" in result["signatures"]["bleu"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["train", "recipes/demo/sentiment.yaml", "run.sed=1"], "did you mean seed"),
        (["train", "recipes/sst2.yaml", "data.path=nowhere"], "does not exist"),
        (["train", "recipes/sst2.yaml", "model.encoder=5"], "model.encoder"),
        (["train", "recipes/sst2.yaml", "data.cut.test=-1"], "data.cut.test: Input should be greater than 0 (got -1)"),
        (["evaluate", "recipes"], "recipe.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    extra = [f"run.output_dir={tmp_path}"] if arguments[0] == "train" else []
    assert main([*arguments, *extra]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_labels_that_only_the_validation_split_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {"train": ["a good film,yes", "a bad film,no"] * 10, "validation": ["a fine film,maybe", "a good film,yes"]}
    for name, rows in lines.items():
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    data = {"path": str(tmp_path), "columns": {"input": "text", "target": "label"}, "tokenizer": WORDS}
    path = write_recipe(tmp_path / "recipe.yaml", data=data)
    assert main(["train", path, f"run.output_dir={tmp_path / 'some'}"]) == 0
    assert "can never be right: maybe" in capsys.readouterr().out
    (tmp_path / "validation.csv").write_text("text,label\na fine film,maybe\n")
    assert main(["train", path, f"run.output_dir={tmp_path / 'none'}"]) == 2
    assert "has a label that the model knows (no, yes)" in capsys.readouterr().err


def test_a_bad_recipe_fails_before_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from training.__main__ import main; "
        "assert main(['train', 'recipes/sst2.yaml', 'optim.learning_rate=-1']) == 2; "
        "print({'torch', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "datasets" not in done.stdout
    assert "optim.learning_rate" in done.stderr


def test_help_shows_examples() -> None:
    for command in ("train", "evaluate"):
        done = subprocess.run(
            [sys.executable, "-m", "training", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert "examples:" in done.stdout and f"python -m training {command}" in done.stdout
