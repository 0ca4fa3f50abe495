"""Distillation: what the teacher writes is what it answers one at a time, and no interruption changes a line."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from seqmodels.errors import ConfigError, DataError
from seqmodels.pipeline import Pipeline
from tests.training.recipes import CLASSIFIER, TRANSLATOR, WORDS, fields, recipe
from training import distill as module
from training.__main__ import main
from training.data import generated
from training.data.sources import load_rows
from training.distill import distill
from training.run import train

PAIRS = {"generated": "numbers-en-fr", "tokenizer": WORDS}
SEARCH = {"num_beams": 3, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generated.SIZES, "numbers-en-fr", (40, 6, 5))
    monkeypatch.setattr(module, "ROWS", 16)


def a_teacher(directory: Path, **run: Any) -> Path:
    run = {"max_steps": 30, "rows_per_batch": 8, **run}
    made = {"data": PAIRS, "model": TRANSLATOR, "generation": SEARCH, "optim": {"learning_rate": 0.02}}
    return train(recipe("translate", directory, run=run, **made))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_student_learns_from_what_its_teacher_answers_by_the_two_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = a_teacher(tmp_path / "teacher")
    assert main(["distill", "teacher", "--output", "distilled"]) == 0
    pipeline = Pipeline.from_pretrained(teacher)
    expected = [
        {"input": row.input, "target": pipeline([row.input])[0]["sequences"][0]["text"]}
        for row in generated.generate("numbers-en-fr")["train"]
    ]
    written = lines(tmp_path / "distilled" / "train.jsonl")
    assert written == expected
    assert len({line["target"] for line in written}) > 5, "an untrained teacher would say one thing"
    for role in ("validation", "test"):
        rows = generated.generate("numbers-en-fr")[role]
        assert lines(tmp_path / "distilled" / f"{role}.jsonl") == [
            {"input": row.input, "target": row.references[0]} for row in rows
        ]
    card = (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")
    assert pipeline.revision in card and '{"num_beams": 3, "max_new_tokens": 6}' in card
    (command,) = [line.strip() for line in card.splitlines() if line.startswith("    python -m training")]
    small = {"embedding_size": 4, "recurrent": {"cell": "gru", "hidden_size": 4}}
    model = {"architecture": "generator", "encoder": {"input": "text", **small}, "decoder": small}
    made = fields("translate", tmp_path / "student", data=PAIRS, model=model, generation=SEARCH)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    arguments = shlex.split(command.replace("RECIPE.yaml", "small.yaml"))
    assert arguments[:3] == ["python", "-m", "training"]
    assert main(arguments[3:]) == 0
    assert main(["evaluate", "student"]) == 0  # on the test split of the same folder
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 5


def test_several_teachers_answer_as_one_with_options_of_the_command(tmp_path: Path) -> None:
    teachers = [a_teacher(tmp_path / name, seed=seed) for seed, name in enumerate("ab", start=1)]
    arguments = [*map(str, teachers), "generation.num_beams=2", "--average", "logprob"]
    assert main(["distill", *arguments, "--output", str(tmp_path / "distilled")]) == 0
    pipeline = Pipeline.from_pretrained(teachers, average="logprob")
    for line in lines(tmp_path / "distilled" / "train.jsonl"):
        assert line["target"] == pipeline([line["input"]], num_beams=2)[0]["sequences"][0]["text"]
    card = (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")
    assert "a b (mean logprob)" in card and '"num_beams": 2' in card


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_interrupted_one_goes_on_behind_the_last_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    teacher = a_teacher(tmp_path / "teacher")
    command = ["distill", str(teacher), "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    answered = 0
    with monkeypatch.context() as patch:
        run = Pipeline.run

        def interrupted(pipeline: Pipeline, jobs: Any) -> Any:
            nonlocal answered
            if answered == left * 16:
                raise KeyboardInterrupt
            answered += len(jobs)
            return run(pipeline, jobs)

        patch.setattr(Pipeline, "run", interrupted)
        assert main([*command, str(tmp_path / "stopped")]) == 130
    assert not (tmp_path / "stopped" / "train.jsonl").exists()
    half = {"path": str(tmp_path / "stopped"), "columns": {"input": "input", "target": "target"}}
    with pytest.raises(DataError, match="is half written; give its `distill` command again"):
        load_rows(recipe("translate", data=half, model=TRANSLATOR))
    with (tmp_path / "stopped" / module.HALF_WRITTEN).open("ab") as file:
        file.write(b'{"input": "half a li')
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run", lambda pipeline, jobs: asked.extend(jobs) or run(pipeline, jobs))
        assert main([*command, str(tmp_path / "stopped")]) == 0
    assert len(asked) == 40 - left * 16, "what was written is not written again"
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {".distill.json", "train.jsonl", "validation.jsonl", "test.jsonl", "README.md"}
    assert names == {path.name for path in (tmp_path / "stopped").iterdir()}
    for name in names - {"README.md"}:  # which names its folder
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    capsys.readouterr()
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_a_folder_that_was_begun_from_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = a_teacher(tmp_path / "one"), a_teacher(tmp_path / "two", seed=2)
    output = ["--output", str(tmp_path / "distilled")]
    assert main(["distill", str(one), *output]) == 0
    for other, words in (
        ([str(two)], "begun with teacher"),
        ([str(one), "generation.num_beams=2"], "search.num_beams 3"),
    ):
        assert main(["distill", *other, *output]) == 2
        error = capsys.readouterr().err
        assert words in error and "name another --output" in error and error.count("\n") == 1
    assert main(["distill", str(one), "--output", str(one)]) == 2
    assert "holds something else" in capsys.readouterr().err
    (tmp_path / "distilled" / module.BEGUN).write_text("{}")
    assert main(["distill", str(one), *output]) == 2
    assert module.BEGUN in capsys.readouterr().err


def test_two_at_once(tmp_path: Path) -> None:
    first, second = module._appending(tmp_path / "x"), module._appending(tmp_path / "x")
    with first, pytest.raises(ConfigError, match="another process"), second:
        pass


@pytest.mark.parametrize("target", ["fr", ["fr", "frs"]])
def test_own_columns_references_and_splits(tmp_path: Path, target: Any) -> None:
    """Rows of several references become one row; what is too long for the teacher is left out."""
    (tmp_path / "own").mkdir()
    pairs = [("seven", ["sept", "SEPT"]), ("one " * 40, ["un"]), ("two", ["deux"]), ("three", ["trois", "TROIS"])]
    for name in ("train", "validation"):
        rows = [{"en": en, "fr": fr} if target == "fr" else {"en": en, "fr": fr[0], "frs": fr[1:]} for en, fr in pairs]
        (tmp_path / "own" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"path": str(tmp_path / "own"), "columns": {"input": "en", "target": target}, "tokenizer": WORDS}
    made = recipe(
        "translate", tmp_path / "teacher", data={**data, "max_input_length": 30}, model=TRANSLATOR, generation=SEARCH
    )
    teacher = train(made)
    said = Console(file=(tmp_path / "said").open("w"))
    distill([teacher], made, tmp_path / "distilled", {}, console=said)
    read = made.model_copy(update={"data": made.data.model_copy(update={"path": str(tmp_path / "distilled")})})
    before, rows = load_rows(made), load_rows(read)
    assert rows["validation"] == before["validation"]
    pipeline = Pipeline.from_pretrained(teacher)
    expected = {str(row.input): pipeline([row.input])[0]["sequences"][0]["text"] for row in before["train"][:1]}
    written = lines(tmp_path / "distilled" / "train.jsonl")
    assert [line["en"] for line in written] == ["seven", "two", "three"]
    assert written[0]["fr"] == [expected["seven"]] and (target == "fr" or written[0]["frs"] == [])
    assert "longer than the teacher reads | 1 |" in (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")


def test_only_translators_are_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(directory=tmp_path / "run", model=CLASSIFIER, run={"max_eval_samples": 4}))
    assert main(["distill", str(tmp_path / "run"), "--output", str(tmp_path / "x")]) == 2
    assert "is for task classify; only translators" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_it_says_how_far_it_is_where_no_bar_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    made = recipe("translate", tmp_path / "teacher", data=PAIRS, model=TRANSLATOR, generation=SEARCH)
    with (tmp_path / "said").open("w+") as file:
        distill([train(made)], made, tmp_path / "distilled", {}, console=Console(file=file, soft_wrap=True))
        file.seek(0)
        said = file.read()
    assert [line.split()[0] for line in said.splitlines()[:3]] == ["16/40", "32/40", "40/40"]
    assert "0:00:00 left" in said
