"""Several labels, numbers, weights of classes and calibration: from a table to answers, and measures by hand."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError, DataError
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import load_pretrained
from tests.training.recipes import CLASSIFIER, WORDS, recipe
from training import metrics
from training.__main__ import main
from training.calibrate import COLDEST, HOTTEST, _quality, fit_temperature, fits
from training.data.generated import generate
from training.run import train

COLOURS = ["blue", "green", "red"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colours(path: Path) -> Path:
    """Texts, the colours that they name, and two numbers that hang on them."""
    source, rows = random.Random(1), []
    for _ in range(600):
        words = [source.choice([*COLOURS, "a", "the", "car"]) for _ in range(source.randint(1, 6))]
        named = sorted({word for word in words if word in COLOURS})
        colourful = sum(word in COLOURS for word in words)
        rows.append({"text": " ".join(words), "colours": named, "count": len(words), "price": 100.0 * colourful - 50})
    return write(path, rows)


def recipe_on(data: Path, target: Any, directory: Path, steps: int = 250, **model: Any) -> Any:
    columns = {"input": "text", "target": target}
    return recipe(
        directory=directory,
        data={"path": str(data), "columns": columns, "cut": {"validation": 0.15}, "tokenizer": WORDS},
        model={**CLASSIFIER, "pooling": "max", **model},
        optim={"learning_rate": 1e-2},
        run={"max_steps": steps, "eval_steps": min(steps, 50), "rows_per_batch": 32},
    )


def test_several_labels(tmp_path: Path) -> None:
    data = colours(tmp_path / "colours.jsonl")
    kind = "multi_label_classification"
    directory = train(recipe_on(data, "colours", tmp_path / "run", problem_type=kind))
    scores = json.loads((directory / "finished.json").read_text())["validation"]
    assert set(scores) == {"micro_f1", "macro_f1", "exact_match", "nll"}
    assert scores["micro_f1"] > 0.99
    answers = Pipeline.from_pretrained(directory)(["the red car a blue", "the car"])
    assert [answer["labels"] for answer in answers] == [["blue", "red"], []]
    assert list(answers[0]["scores"]) == COLOURS
    # Members of an ensemble answer each question by their mean.
    twice = Pipeline.from_pretrained([directory, directory])(["the red car a blue"])[0]
    assert twice["scores"] == pytest.approx(answers[0]["scores"], abs=1e-6)
    assert main(["evaluate", str(directory), str(directory), "--split", "validation"]) == 0


def test_numbers_in_their_own_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path / "colours.jsonl")
    directory = train(recipe_on(data, ["count", "price"], tmp_path / "run", problem_type="regression", pooling="last"))
    scores = json.loads((directory / "finished.json").read_text())["validation"]
    assert set(scores) == {"mse", "mae", "r2", "nll"}
    assert scores["r2"] > 0.9
    values = Pipeline.from_pretrained(directory)(["the red car a blue"])[0]["values"]
    assert list(values) == ["count", "price"]
    assert values["count"] == pytest.approx(5, abs=1) and values["price"] == pytest.approx(150, abs=30)
    assert main(["evaluate", str(directory), str(directory), "--split", "validation"]) == 0
    two = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert two == pytest.approx(scores, rel=1e-4), "twice the same model is that model"


def test_a_regression_goes_on_with_the_scales_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colours(tmp_path / "colours.jsonl")
    made = recipe_on(data, "price", tmp_path / "run", steps=4, problem_type="regression")
    with monkeypatch.context() as patch:
        patch.setattr("training.run._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(made)
    train(made)
    config = load_pretrained(tmp_path / "run").config
    prices = [json.loads(line)["price"] for line in data.read_text().splitlines()]
    assert config.target_mean[0] == pytest.approx(sum(prices) / len(prices), abs=10)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["model"]["target_std"] == list(config.target_std)


def test_labels_as_one_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tagger with a CRF from table to tags: trained, calibrated, averaged with itself, gone on with."""
    source = random.Random(1)
    rows = []
    for _ in range(300):
        words = [source.choice(["buy", "red", "cars", "now"]) for _ in range(source.randint(2, 8))]
        inside = [i > 0 and words[i - 1] == "red" for i in range(len(words))]
        tags = [
            "I-THING" if after else "B-THING" if word == "red" else "O"
            for word, after in zip(words, inside, strict=True)
        ]
        rows.append({"words": words, "tags": tags})
    data = {"path": str(write(tmp_path / "tags.jsonl", rows)), "columns": {"input": "words", "target": "tags"}}
    data |= {"cut": {"validation": 0.2}, "tokenizer": {"kind": "bpe", "vocab_size": 260}}  # words of several pieces
    run = {"max_steps": 80, "rows_per_batch": 32}
    model = {"architecture": "tagger", "encoder": CLASSIFIER["encoder"], "crf": True}
    made = recipe("tag", tmp_path / "run", data=data, model=model, optim={"learning_rate": 2e-2}, run=run)
    directory = train(made)
    scores = json.loads((directory / "finished.json").read_text())["validation"]
    assert scores["span_f1"] > 0.98
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "Each kind of span" in page and "<td>THING</td>" in page and "red/B-THING  cars/" in page
    for row in rows[::5]:  # else it is always right, and no temperature is cold enough
        row["tags"] = ["O"] * len(row["words"])
    other = write(tmp_path / "other.jsonl", rows)
    assert main(["calibrate", str(directory), f"data.path={other}", "data.splits.validation=train"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(directory), str(directory), "--split", "validation"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["span_f1"] == pytest.approx(scores["span_f1"])
    assert "crf.transitions" in load_pretrained(directory).model.state_dict()
    model = {"init_from": str(directory)}
    further = recipe("tag", tmp_path / "further", data={**data, "tokenizer": {}}, model=model)
    assert load_pretrained(train(further)).config.crf


@pytest.mark.parametrize(
    ("row", "target", "kind", "named"),
    [
        ({"text": "a", "y": "many"}, "y", "regression", "'many'"),
        ({"text": "a", "y": None}, "y", "regression", "None"),
        ({"text": "a", "y": True}, "y", "regression", "True"),
        ({"text": "a", "y": None}, "y", "multi_label_classification", "empty list"),
    ],
)
def test_a_bad_target_is_named(tmp_path: Path, row: dict[str, Any], target: str, kind: str, named: str) -> None:
    good = {"regression": [1.0, 2.0], "multi_label_classification": [["a"], ["b"]]}[kind]
    data = write(tmp_path / "bad.jsonl", [{"text": "a", "y": y} for y in good] + [row])
    with pytest.raises(DataError, match=f"row 3, column 'y'.*{named}"):
        train(recipe_on(data, target, tmp_path / "run", problem_type=kind))


def test_numbers_that_never_change_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "same.jsonl", [{"text": f"word{i}", "y": 2} for i in range(20)])
    with pytest.raises(DataError, match="y is the same number"):
        train(recipe_on(data, "y", tmp_path / "run", problem_type="regression"))


def test_settings_that_do_nothing_are_refused(tmp_path: Path) -> None:
    data = colours(tmp_path / "colours.jsonl")
    with pytest.raises(ConfigError, match=r"data\.columns\.target is a list"):
        recipe_on(data, ["count", "price"], tmp_path)
    with pytest.raises(ConfigError, match=r"run\.metric_for_best_model.*mse"):
        recipe(model={**CLASSIFIER, "problem_type": "regression"}, run={"metric_for_best_model": "accuracy"})
    with pytest.raises(DataError, match=r"model\.class_weights has 'goood'"):
        train(recipe(directory=tmp_path / "w", model={**CLASSIFIER, "class_weights": {"goood": 2.0}}))


def test_a_weighted_class_is_found_more_often(tmp_path: Path) -> None:
    source, rows = random.Random(2), []
    for _ in range(400):  # the words tell nothing, and one label is rare
        words = " ".join(source.choices("abc", k=9))
        rows.append({"text": words, "y": "rare" if source.random() < 0.2 else "usual"})
    data = write(tmp_path / "rare.jsonl", rows)
    found = {}
    for weight in (1.0, 8.0):
        weights = {"class_weights": {"rare": weight}}
        directory = train(recipe_on(data, "y", tmp_path / f"run-{weight}", steps=50, **weights))
        found[weight] = {answer["label"] for answer in Pipeline.from_pretrained(directory)(["a", "b", "c"])}
    assert found == {1.0: {"usual"}, 8.0: {"rare"}}


def test_measures_by_hand() -> None:
    predicted, expected = [{"a"}, {"a", "b"}, set()], [{"a"}, {"b"}, {"c"}]
    counts = metrics.counts_by_label(predicted, expected)
    assert counts == [(1, 2, 1), (1, 1, 1), (0, 0, 1)]
    assert metrics.micro_f1(counts) == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.mean_f1(counts) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert metrics.micro_f1([]) == metrics.mean_f1([]) == 0
    numbers, right = [[1.0, 0.0], [2.0, 0.0]], [[1.0, 5.0], [4.0, 5.0]]
    assert metrics.mean_square_error(numbers, right) == (0 + 25 + 4 + 25) / 4
    assert metrics.mean_absolute_error(numbers, right) == (0 + 5 + 2 + 5) / 4
    # The first: residual 4, spread 4.5. The second never changes, so it explains nothing.
    assert metrics.r2(numbers, right) == pytest.approx(((1 - 4 / 4.5) + 0) / 2)


def test_a_planted_temperature_is_found_and_is_the_best_of_a_grid() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(20000, 4, dtype=torch.float64)
    labels = torch.multinomial((logits / 1.8).softmax(1), 1)[:, 0]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(1.8, rel=0.03)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, labels))

    assert nll(found) <= min(nll(found + step) for step in (-0.3, -0.01, 0.01, 0.3))
    coldest = fit_temperature(logits, logits.argmax(1))
    assert coldest == pytest.approx(COLDEST), "all right: as cold as it may be"
    assert fits(found) and not fits(coldest) and not fits(HOTTEST)


def test_calibrate_changes_probabilities_and_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train(recipe(directory=tmp_path / "run", run={"max_steps": 40, "num_train_epochs": None}))
    texts = ["a fine film", "a dull film", "not bad"]
    before = Pipeline.from_pretrained(directory)(texts)
    card = (directory / "README.md").read_text()
    assert main(["evaluate", str(directory), "--split", "validation"]) == 0
    raw = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert main(["calibrate", str(directory)]) == 0
    said = capsys.readouterr().out
    temperature = ModelConfig.load(directory / "config.json").temperature
    assert f"temperature {temperature:.4f}" in said and temperature != 1.0
    after = Pipeline.from_pretrained(directory)(texts)
    assert [answer["label"] for answer in after] == [answer["label"] for answer in before]
    for warm, cold in zip(after, before, strict=True):
        logits = torch.tensor(list(cold["scores"].values())).log()
        expected = (logits / temperature).softmax(0).tolist()
        assert list(warm["scores"].values()) == pytest.approx(expected, abs=1e-5)
    assert (directory / "README.md").read_text() == card
    assert main(["evaluate", str(directory), "--split", "validation"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert scores["accuracy"] == raw["accuracy"] and scores["nll"] < raw["nll"]
    assert f"nll {raw['nll']:.4f} before, {scores['nll']:.4f} with it" in said
    # Calibrating again begins anew, and a run that starts from the model does so without it.
    assert main(["calibrate", str(directory)]) == 0
    assert ModelConfig.load(directory / "config.json").temperature == temperature
    further = train(recipe(directory=tmp_path / "further", data={"generated": "sentiment"},
                           model={"init_from": str(directory)}))  # fmt: skip
    assert load_pretrained(further).config.temperature == 1.0


def test_a_temperature_at_its_bound_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every answer is right, none is cold enough; one wrong answer would then cost without end."""
    rows = [{"text": f"a {word} film {n}", "label": word} for n in range(60) for word in ("good", "bad")]
    columns = {"input": "text", "target": "label"}
    data = {"path": str(write(tmp_path / "rows.jsonl", rows)), "columns": columns, "cut": {"validation": 20}}
    optim, run = {"learning_rate": 0.02}, {"max_steps": 60}
    directory = train(recipe(directory=tmp_path / "run", data={**data, "tokenizer": WORDS}, optim=optim, run=run))
    before = (directory / "config.json").read_bytes()
    assert main(["calibrate", str(directory)]) == 2
    error = capsys.readouterr().err
    assert "temperature would be 0.0500" in error and "is left as it was" in error
    assert (directory / "config.json").read_bytes() == before


def test_only_what_has_labels_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path / "colours.jsonl")
    directory = train(recipe_on(data, "count", tmp_path / "run", steps=2, problem_type="regression"))
    assert main(["calibrate", str(directory)]) == 2
    assert "only classifiers and taggers" in capsys.readouterr().err


def test_large_numbers_are_learned_in_bfloat16_too(tmp_path: Path) -> None:
    source, rows = random.Random(3), []
    for i in range(200):
        word = source.choice(["old", "new"])
        rows.append({"text": f"{word} {i}", "year": 2001 if word == "old" else 2009})
    made = recipe_on(write(tmp_path / "years.jsonl", rows), "year", tmp_path / "run", problem_type="regression")
    made = made.model_copy(update={"run": made.run.model_copy(update={"bf16": True})})
    scores = json.loads((train(made) / "finished.json").read_text())["validation"]
    assert scores["mse"] < 0.5, "bfloat16 itself has no number between 2,000 and 2,008"


def test_as_many_numbers_as_the_model_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path / "colours.jsonl")
    directory = train(recipe_on(data, ["count", "price"], tmp_path / "run", steps=2, problem_type="regression"))
    capsys.readouterr()
    other = [
        "data.columns.target=count",
        f"data.path={colours(tmp_path / 'other.jsonl')}",
        "data.splits.validation=train",
    ]
    assert main(["evaluate", str(directory), "--split", "validation", *other]) == 2
    assert "names 1 columns, but the model gives 2 numbers (count, price)" in capsys.readouterr().err
    assert main(["evaluate", str(directory), "--split", "validation", "--baseline"]) == 2
    assert "no baseline for regression" in capsys.readouterr().err


def test_a_classifier_starts_from_a_regression_without_its_scales(tmp_path: Path) -> None:
    data = colours(tmp_path / "colours.jsonl")
    directory = train(recipe_on(data, "price", tmp_path / "run", steps=2, problem_type="regression"))
    given = {"path": str(data), "columns": {"input": "text", "target": "count"}, "cut": {"validation": 0.15}}
    model = {"init_from": str(directory), "problem_type": "single_label_classification"}
    assert load_pretrained(train(recipe(directory=tmp_path / "next", data=given, model=model))).config.target_mean == ()


def test_a_constant_is_refused_though_its_deviation_is_not_quite_zero(tmp_path: Path) -> None:
    data = write(tmp_path / "same.jsonl", [{"text": f"word{i}", "y": 0.1} for i in range(20)])
    with pytest.raises(DataError, match="y is the same number"):
        train(recipe_on(data, "y", tmp_path / "run", problem_type="regression"))


def test_nothing_is_calibrated_on_labels_that_the_model_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(recipe(directory=tmp_path / "run"))
    before = (directory / "config.json").read_bytes()
    other = write(tmp_path / "other.jsonl", [{"text": f"a fine film {i}", "verdict": "superb"} for i in range(9)])
    given = ["data.generated=null", f"data.path={other}", "data.columns={input: text, target: verdict}"]
    assert main(["calibrate", str(directory), *given, "data.splits.validation=train"]) == 2
    assert "has a label that the model knows (negative, positive)" in capsys.readouterr().err
    assert (directory / "config.json").read_bytes() == before


def test_nothing_is_calibrated_on_rows_that_may_have_been_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews = [{"text": row.input, "verdict": row.target} for row in generate("sentiment")["train"][:200]]
    columns = {"input": "text", "target": "verdict"}
    data = {"path": str(write(tmp_path / "rows.jsonl", reviews)), "columns": columns, "cut": {"validation": 50}}
    run = {"max_steps": 80}
    directory = train(recipe(directory=tmp_path / "run", data={**data, "tokenizer": WORDS}, run=run))
    before = (directory / "config.json").read_bytes()
    assert main(["calibrate", str(directory), "data.cut.seed=2"]) == 2
    assert "cut from other data than" in capsys.readouterr().err
    assert (directory / "config.json").read_bytes() == before
    assert main(["calibrate", str(directory)]) == 0


def test_nothing_is_calibrated_on_pictures_that_were_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [(Image.new("RGB", (8, 8), (10 * n, 0, 255 * (n % 2))), ("red", "blue")[n % 2]) for n in range(24)]
    for number, (picture, _) in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    rows = [{"picture": str(tmp_path / f"{number}.png"), "kind": kind} for number, (_, kind) in enumerate(pictures)]
    for split, some in (("train", rows), ("validation", rows[:12])):
        write(tmp_path / f"{split}.jsonl", some)
    data = {"path": str(tmp_path), "columns": {"input": "picture", "target": "kind"}}
    encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [2, 4]}}
    directory = train(
        recipe(directory=tmp_path / "run", data=data, model={"architecture": "classifier", "encoder": encoder})
    )
    before = (directory / "config.json").read_bytes()
    assert main(["calibrate", str(directory)]) == 2
    assert "was trained on 12 of the 12 inputs of the validation split" in capsys.readouterr().err
    assert (directory / "config.json").read_bytes() == before


def test_a_tagger_starts_from_any_classifier_with_a_head_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same labels too, which it gives to other things."""
    data = colours(tmp_path / "colours.jsonl")
    tags = [{"words": ["a", "red", f"{n}", "car"], "tags": ["blue", "red", "green", "blue"]} for n in range(40)]
    tagged = {
        "path": str(write(tmp_path / "tags.jsonl", tags)),
        "columns": {"input": "words", "target": "tags"},
        "cut": {"validation": 4},
    }
    for number, (kind, target) in enumerate((("multi_label_classification", "colours"), ("regression", "count"))):
        begun = train(recipe_on(data, target, tmp_path / f"from-{number}", steps=2, problem_type=kind, pooling="last"))
        model = {"init_from": str(begun), "architecture": "tagger"}
        capsys.readouterr()
        directory = train(recipe("tag", tmp_path / f"tagger-{number}", data=tagged, model=model))
        assert f"begun from {begun}, but for the new head" in capsys.readouterr().out
        assert load_pretrained(directory).config.labels == ("blue", "green", "red")


def test_a_model_whose_run_cannot_be_read_is_used_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another version of this project, say: what its run.json holds is not what the model is."""
    directory = train(recipe(directory=tmp_path / "run", run={"max_steps": 80}))
    (directory / "run.json").write_text('{"of": "another version"}', encoding="utf-8")
    for command in ("evaluate", "calibrate"):
        assert main([command, str(directory), *(["--split", "validation"] if command == "evaluate" else [])]) == 0
        assert "nothing tells whether the validation split was trained on" in capsys.readouterr().out


def test_the_calibration_error_by_hand() -> None:
    """Of four answers with 0.8 three are right, of two with 0.6 none: 4/6 * |0.8 - 0.75| + 2/6 * |0.6 - 0|."""
    sure, unsure = [math.log(0.8), math.log(0.2)], [math.log(0.6), math.log(0.4)]
    logits = torch.tensor([sure] * 4 + [unsure] * 2, dtype=torch.float64)
    nll, error = _quality(logits, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert error == pytest.approx(4 / 6 * 0.05 + 2 / 6 * 0.6)
    assert nll == pytest.approx(-(3 * math.log(0.8) + math.log(0.2) + 2 * math.log(0.4)) / 6)


def test_span_f1_needs_spans(tmp_path: Path) -> None:
    rows = [{"text": ["a", str(i)], "tags": ["X", "Y"]} for i in range(18)]
    columns = {"input": "text", "target": "tags"}
    data = {"path": str(write(tmp_path / "tags.jsonl", rows)), "columns": columns, "cut": {"validation": 3}}
    run = {"metric_for_best_model": "span_f1"}
    made = recipe("tag", tmp_path / "run", data=data, model={**CLASSIFIER, "architecture": "tagger"}, run=run)
    with pytest.raises(ConfigError, match="labels are not BIO"):
        train(made)
