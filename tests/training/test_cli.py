"""python -m training: your own files end to end, help, and one line for every mistake."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from seqmodels.errors import ConfigError
from seqmodels.models import Model
from seqmodels.pipeline import Pipeline
from tests.seqmodels.builders import make_language_model, make_model
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TAGGER, TRANSLATOR, WORDS, fields, recipe
from training.__main__ import main
from training.data.generated import generate
from training.data.rows import Row
from training.run import _drawn
from training.scoring import applicable

ROOT = Path(__file__).parent.parent.parent
A_TAGGER = {
    "architecture": "tagger",
    "encoder": {"input": "features", "feature_size": 3, "recurrent": {"hidden_size": 4}},
    "labels": ["O", "X"],
}
HIDDEN = "model.encoder.recurrent.hidden_size"


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


def test_scores_of_other_data_have_a_file_of_their_own(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reviews.parent / "model"
    new = reviews.parent / "new.csv"
    new.write_text("text,label\na fine film,good\na dull film,bad\n", encoding="utf-8")
    assert main(["evaluate", str(model), "--split", "validation"]) == 0
    before = {path.name for path in model.glob("evaluation-*")}
    for other in (new, reviews):
        assert main(["evaluate", str(model), f"data.path={other}", "data.splits.test=train"]) == 0
    made = sorted({path.name for path in model.glob("evaluation-*")} - before)
    assert [name.rpartition("-")[0] for name in made] == ["evaluation-test-new.csv", "evaluation-test-reviews.csv"]
    assert json.loads((model / made[0]).read_text())["rows"] == 2


def test_data_in_another_spelling_of_its_path_are_those_that_were_trained_on(
    reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = reviews.parent / "model" / ".." / "reviews.csv"
    assert main(["evaluate", str(reviews.parent / "model"), f"data.path={other}", "data.splits.test=train"]) == 0
    assert "data.splits.test is 'train', which the model was trained on" in capsys.readouterr().out
    before = set((reviews.parent / "model").glob("evaluation-*"))
    for path in (other, reviews):
        assert main(["evaluate", str(reviews.parent / "model"), f"data.path={path}"]) == 0
    made = set((reviews.parent / "model").glob("evaluation-*")) - before
    assert {path.name for path in made} == {"evaluation-test.json"}


def test_a_long_search_has_a_name_that_a_disk_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    recipe = write_recipe(tmp_path / "recipe.yaml", task="translate", data=data, model=TRANSLATOR)
    run = ["run.max_eval_samples=4", "generation.max_new_tokens=3", f"run.output_dir={tmp_path / 'model'}"]
    assert main(["train", recipe, *run]) == 0
    words = ", ".join(f"deux cent {word}" for word in ("un", "trois", "quatre") for _ in range(10))
    search = {"num_beams": 2, "length_penalty": 0.75, "repetition_penalty": 1.25, "no_repeat_ngram_size": 7}
    search |= {"min_new_tokens": 1, "prefix": "deux", "bad_words": f"[{words}]", "top_logprobs": 3}
    given = [f"generation.{name}={value}" for name, value in search.items()]
    assert main(["evaluate", str(tmp_path / "model"), *given]) == 0, capsys.readouterr().err
    (made,) = (tmp_path / "model").glob("evaluation-test-*.json")
    assert len(made.name) < 180


def test_a_reader_that_leaves_an_evaluation(reviews: Path) -> None:
    command = [sys.executable, "-m", "training", "evaluate", str(reviews.parent / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as evaluation:
        assert evaluation.stdout and evaluation.stderr
        evaluation.stdout.close()
        assert (evaluation.wait(60), evaluation.stderr.read()) == (0, b"")
    assert (reviews.parent / "model" / "evaluation-test.json").is_file()


def test_a_closed_output_is_nobody_to_speak_to(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    command = f"{sys.executable} -m training train {path} run.output_dir={tmp_path / 'model'} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def _letters(number: int) -> str:
    return "".join("abcde"[(number // 5**place) % 5] for place in range(4))


def test_evaluate_takes_search_options_and_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert main(["train", recipe, f"run.output_dir={tmp_path / 'model'}"]) == 0
    assert main(["evaluate", str(tmp_path / "model"), "--baseline"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["split"] == "test" and result["rows"] == 1000
    assert result["scores"]["bag_of_words_baseline"] <= 0.75
    assert result["loading"] == {}
    for option, name in ((["--decoder-weights", "int8"], "decoder_weights is 'int8'"), (["--shortlist"], "shortlist")):
        assert main(["evaluate", str(tmp_path / "model"), *option]) == 2
        error = capsys.readouterr().err
        assert name in error and f"leave out {option[0]}" in error
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    recipe = write_recipe(tmp_path / "recipe.yaml", task="translate", data=data, model=TRANSLATOR)
    run = [f"run.output_dir={tmp_path / 'translator'}", "run.max_eval_samples=4", "generation.max_new_tokens=3"]
    assert main(["train", recipe, *run]) == 0
    assert main(["evaluate", str(tmp_path / "translator"), "generation.num_beams=3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["search"] == {"max_new_tokens": 3, "num_beams": 3}
    kept = json.loads((tmp_path / "translator" / "evaluation-test-num_beams=3.json").read_text())
    assert {**kept, **result} == kept
    assert main(["evaluate", str(tmp_path / "translator")]) == 0
    capsys.readouterr()
    assert "tok:13a" in result["signatures"]["bleu"]
    assert main(["evaluate", str(tmp_path / "translator"), "--shortlist"]) == 2
    assert "python -m training shortlist" in capsys.readouterr().err
    assert main(["shortlist", str(tmp_path / "translator"), "--translations", "0"]) == 2
    assert main(["shortlist", str(tmp_path / "translator"), "--translations", "5", "--frequent", "5"]) == 0
    assert "tokens in the median" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "translator"), "--shortlist", "--decoder-weights", "int8"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loading"] == {
        "decoder_weights": "int8",
        "shortlist": True,
    }
    revision = json.loads((tmp_path / "translator" / "evaluation-test-int8-shortlist.json").read_text())["revision"]
    plain = json.loads((tmp_path / "translator" / "evaluation-test.json").read_text())
    assert plain["loading"] == {"decoder_weights": "float32", "shortlist": False}
    assert revision == result["revision"]  # a list is no part of the model
    assert main(["shortlist", str(tmp_path / "model")]) == 2
    assert "does not translate" in capsys.readouterr().err


@pytest.mark.parametrize("model", [make_language_model(), make_model(**A_TAGGER)], ids=["language model", "tagger"])
def test_scores_without_a_search_depend_on_no_option_of_one(model: Model) -> None:
    assert applicable(model.config, {"decoder_weights": "float32", "shortlist": False}) == {}
    for name, value in {"decoder_weights": "int8", "shortlist": True}.items():
        with pytest.raises(ConfigError, match=f"{name} is .* is scored without a search; leave out --"):
            applicable(model.config, {name: value})


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A finished run on a file from which validation and test are cut."""
    lines = [f"a {word} film number {n},{word}" for n in range(20) for word in ("good", "bad")]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    columns = {"input": "text", "target": "label"}
    data = {"path": str(tmp_path / "reviews.csv"), "columns": columns, "cut": {"validation": 4, "test": 6}}
    recipe = write_recipe(tmp_path / "recipe.yaml", data={**data, "tokenizer": WORDS})
    assert main(["train", recipe, f"run.output_dir={tmp_path / 'model'}"]) == 0
    return tmp_path / "reviews.csv"


def test_evaluate_refuses_a_split_cut_from_other_data(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(reviews.parent / "model")
    assert main(["evaluate", model]) == 0 and main(["evaluate", model, "--split", "train"]) == 0
    assert main(["evaluate", model, "data.cut.test=8"]) == 2
    assert "may have been trained on" in capsys.readouterr().err
    moved = reviews.rename(reviews.parent / "moved.csv")
    assert main(["evaluate", model, f"data.path={moved}"]) == 0  # the same rows in another place
    moved.write_text(moved.read_text() + "one more,good\n")
    for split in ("train", "validation", "test"):
        assert main(["evaluate", model, "--split", split, f"data.path={moved}"]) == 2
        error = capsys.readouterr().err
        assert f"the {split} split is cut from other data" in error and error.count("\n") == 1


def test_evaluate_on_other_data_on_purpose(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = reviews.parent / "new" / "test.csv"
    new.parent.mkdir()
    new.write_text("text,label\na good film,good\n,bad\na bad one,bad\n")
    for data in ([f"data.path={new.parent}"], [f"data.path={new}", "data.splits.test=train"]):
        capsys.readouterr()
        assert main(["evaluate", str(reviews.parent / "model"), *data]) == 0
        said = capsys.readouterr().out
        assert f"scoring on {data[0].partition('=')[2]}; the model was trained on {reviews}" in said
        assert "split test: left out 1 of 3 rows" in said
        assert json.loads(said.splitlines()[-1])["rows"] == 2


@pytest.mark.parametrize(
    "override", ["optim.learning_rate=0.5", "model.dropout=0.1", "run.seed=3", "data.license=mine"]
)
def test_evaluate_refuses_what_would_change_nothing(
    override: str, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(reviews.parent / "model"), override]) == 2
    assert f"error: {override.partition('=')[0]} changes nothing in an evaluation" in capsys.readouterr().err


def test_overrides_may_stand_after_options(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(reviews.parent / "model")
    for arguments in (
        ["--split", "validation", model, "run.threads=1"],
        [model, "--split", "validation", "run.threads=1"],
        [model, "run.threads=1", "--split", "validation", "data.cut.seed=1"],
    ):
        assert main(["evaluate", *arguments]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 4
    assert main(["evaluate", model, "--split", "test", "run.sed=1"]) == 2
    assert "did you mean seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", model, "--slpit", "test"])
    assert "unrecognized arguments: --slpit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["train", "recipes/demo/sentiment.yaml", "run.sed=1"], "did you mean seed"),
        (["train", "recipes/sst2.yaml", "data.path=nowhere"], "does not exist"),
        (["train", "recipes/sst2.yaml", "model.encoder=5"], "model.encoder"),
        (["train", "recipes/sst2.yaml", "data.cut.test=-1"], "data.cut.test: Input should be greater than 0 (got -1)"),
        (["evaluate", "recipes"], "recipe.yaml"),
        (["train", "recipes/demo/sentiment.yaml", "optim.freeze=[encodre]"], "encoder.embedding.weight and 2 more"),
        (["train", "recipes/demo/sentiment.yaml", f"{HIDDEN}=100000000"], "too large for this machine's memory"),
        (["train", "recipes/demo/sentiment.yaml", f"{HIDDEN}={10**30}"], "too large for this machine's memory"),
        (["train", "recipes/demo/sentiment.yaml", "model.encoder.embedding_size=200000000"], "too large for"),
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


@pytest.mark.parametrize("command", [["evaluate"], ["distill", "--output", "x"]])
def test_a_further_model_that_is_not_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "models/one", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: 'nowhere' is no directory; name one that holds a model, or write a setting as key=value, such as "
        "run.seed=2\n"
    )


@pytest.mark.parametrize(
    ("code", "filename", "words"),
    [
        (errno.ENOSPC, None, "error: the disk is full; make room and give the command again\n"),
        (errno.ENOSPC, "a/b", "error: a/b: the disk is full; make room and give the command again\n"),
        (errno.EDQUOT, None, "error: your share of the disk is used up; make room and give the command again\n"),
        (errno.EACCES, "a/b", "error: a/b: Permission denied\n"),
        (errno.EIO, None, "error: a file cannot be read or written: Input/output error\n"),
    ],
)
def test_what_the_system_refuses_is_said_with_its_fix(
    code: int, filename: str | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), filename)

    monkeypatch.setattr("training.average.average_directories", refuse)
    assert main(["average", "a", "b", "--output", "c"]) == 2
    assert capsys.readouterr().err == words


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_an_output_directory_that_cannot_be_made(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["train", str(ROOT / "recipes/demo/sentiment.yaml"), f"run.output_dir={tmp_path / place}"]) == 2
    error = capsys.readouterr().err
    assert "error: run.output_dir is" in error and "where no directory can be written" in error
    assert error.count("\n") == 1


def test_validation_samples_are_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [Row(f"text {n}", "ab"[n % 2]) for n in range(100)]
    drawn = {seed: _drawn(rows, recipe(run={"max_eval_samples": 20, "seed": seed}).run) for seed in (1, 2)}
    assert drawn[1] == _drawn(rows, recipe(run={"max_eval_samples": 20, "seed": 1}).run)
    assert drawn[1] != drawn[2] and rows[:20] not in drawn.values()
    assert len(drawn[1]) == 20 and [row for row in rows if row in drawn[1]] == drawn[1]
    for most in (None, 100, 500):
        assert _drawn(rows, recipe(run={"max_eval_samples": most}).run) == rows


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


def test_what_cannot_go_well_is_said_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in {"train": ["a,b, yes", "c,d,yes "], "validation": ["a long text,b, yes"]}.items():
        (tmp_path / f"{name}.csv").write_text("text,other,label\n" + "\n".join(rows) + "\n")
    data = {"path": str(tmp_path), "columns": {"input": "text", "target": "label"}, "tokenizer": WORDS}
    path = write_recipe(tmp_path / "recipe.yaml", data=data)
    run = ["train", path, f"run.output_dir={tmp_path / 'model'}"]
    assert main([*run, "run.average_best=2", "run.max_steps=1"]) == 0
    said = capsys.readouterr().out
    assert "2 labels: ' yes', 'yes '" in said and "so there is no mean of several; lower run.eval_steps" in said
    assert main([*run[:-1], f"run.output_dir={tmp_path / 'small'}", "data.tokenizer={kind: bpe, vocab_size: 9}"]) == 2
    assert "data.tokenizer.vocab_size is 9, but a bpe tokenizer needs at least" in capsys.readouterr().err
    data["columns"] = {"input": "text", "target": "other"}
    path = write_recipe(
        tmp_path / "recipe.yaml", task="translate", data={**data, "max_input_length": 1}, model=TRANSLATOR
    )
    assert main(["train", path, f"run.output_dir={tmp_path / 'long'}"]) == 2
    assert "no row of the validation split fits: each is empty, or longer than data.max" in capsys.readouterr().err


def test_a_bad_recipe_fails_before_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from training.__main__ import main; "
        "assert main(['train', 'recipes/sst2.yaml', 'optim.learning_rate=-1']) == 2; "
        "print({'torch', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
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


@pytest.mark.parametrize("task", ["classify", "translate", "generate"])
def test_evaluate_takes_models_that_answer_as_one(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same model scores as the model does; two models of the same data as the mean of what they predict."""
    data = {"classify": "sentiment", "translate": "numbers-en-fr", "generate": "language-model"}[task]
    model = {"classify": CLASSIFIER, "translate": TRANSLATOR, "generate": LANGUAGE_MODEL}[task]
    source = {"generated": data, "tokenizer": WORDS}
    recipe = write_recipe(tmp_path / "recipe.yaml", task=task, data=source, model=model)
    directories = [str(tmp_path / name) for name in "ab"]
    for seed, directory in enumerate(directories, start=1):
        settings = [f"run.output_dir={directory}", f"run.seed={seed}", "run.max_eval_samples=4"]
        settings += ["generation.max_new_tokens=3"] if task != "classify" else []
        assert main(["train", recipe, *settings]) == 0
    capsys.readouterr()

    def scored(*given: str) -> dict[str, Any]:
        assert main(["evaluate", *given, "--split", "validation"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    alone, other = (scored(directory) for directory in directories)
    twice = scored(directories[0], directories[0])
    assert twice["scores"] == pytest.approx(alone["scores"], rel=1e-4)
    both = scored(*directories, "--average", "probability")
    # The logarithm is concave: the mean probability is at least as good as the mean of log-probabilities.
    assert both["scores"]["nll"] <= (alone["scores"]["nll"] + other["scores"]["nll"]) / 2 + 1e-6
    assert both["scores"]["nll"] not in (alone["scores"]["nll"], other["scores"]["nll"])
    assert both["model"] == "a b" and both["revision"] not in (alone["revision"], other["revision"])
    assert (tmp_path / "a" / f"evaluation-validation-ensemble-{both['revision']}.json").exists()
    assert main(["evaluate", directories[0], "--average", "logprob"]) == 2
    assert "--average is 'logprob', but one model" in capsys.readouterr().err
