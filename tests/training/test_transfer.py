"""model.init_from: what a new model takes over, what it learns anew, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seqmodels.errors import ConfigError
from seqmodels.pretrained import load_pretrained
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TRANSLATOR, WORDS, recipe, write_rows
from training.__main__ import main
from training.data.rows import Row
from training.run import train

SENTENCES = {"generated": "language-model", "tokenizer": WORDS}
PAIRS = {"generated": "numbers-en-fr", "tokenizer": WORDS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    few = {"max_eval_samples": 4}
    return {
        "generate": train(recipe("generate", root / "lm", data=SENTENCES, model=LANGUAGE_MODEL, run=few)),
        "translate": train(recipe("translate", root / "translator", data=PAIRS, model=TRANSLATOR, run=few)),
        "classify": train(recipe(directory=root / "classifier", run=few)),
    }


def started(saved: Path, directory: Path, task: str = "classify", **sections: Any) -> dict[str, torch.Tensor]:
    """The weights after a step with a frozen encoder."""
    data = {"generated": "sentiment" if task == "classify" else "number-tags"}
    model = {"init_from": str(saved), **sections.pop("model", {})}
    sections = {"optim": {"freeze": ["encoder.*"]}, "data": data, **sections}
    run = {"max_steps": 1, "max_eval_samples": 4}
    return load_pretrained(train(recipe(task, directory, model=model, run=run, **sections))).model.state_dict()


def test_it_says_what_is_taken_over_and_warns_of_other_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row(f"{word} film", (label,)) for word, label in [("good", "1"), ("bad", "0")] * 40]
    rows = [Row(f"{n} {row.input}", row.references) for n, row in enumerate(rows)]
    write_rows(tmp_path / "films.csv", rows)
    data = {"path": str(tmp_path / "films.csv"), "cut": {"validation": 10}}
    read = {**data, "columns": {"target": "input"}, "tokenizer": WORDS}
    first = train(recipe("generate", tmp_path / "lm", data=read, model=LANGUAGE_MODEL))
    model = {"init_from": str(first), "architecture": "classifier"}
    capsys.readouterr()
    for size, warned in ((10, False), (12, True)):
        labelled = {**data, "columns": {"input": "input", "target": "target"}, "cut": {"validation": size}}
        train(recipe(directory=tmp_path / f"cut-{size}", data=labelled, model=model))
        said = capsys.readouterr().out
        assert f"begun from {first}, but for the new head" in said
        assert ("may know rows that are held out here" in said) == warned


@pytest.mark.parametrize(("task", "architecture"), [("classify", "classifier"), ("tag", "tagger")])
def test_a_reader_starts_from_a_language_model(
    saved: dict[str, Path], tmp_path: Path, task: str, architecture: str
) -> None:
    weights = started(saved["generate"], tmp_path, task, model={"architecture": architecture})
    language_model = load_pretrained(saved["generate"])
    taken = {name for name in weights if name.startswith("encoder.")}
    assert taken == {n.replace("decoder", "encoder") for n in language_model.model.state_dict() if "recurrent" in n} | {
        "encoder.embedding.weight"
    }
    for name in taken:
        assert torch.equal(weights[name], language_model.model.state_dict()[name.replace("encoder.", "decoder.")])
    tokenizer = load_pretrained(tmp_path).source_tokenizer
    assert tokenizer is not None and language_model.target_tokenizer is not None
    assert tokenizer.fingerprint == language_model.target_tokenizer.fingerprint


def test_a_classifier_takes_a_translators_encoder_and_its_own_dropout(saved: dict[str, Path], tmp_path: Path) -> None:
    model = {
        "architecture": "classifier",
        "pooling": "mean",
        "encoder": {"dropout": 0.25, "recurrent": {"dropout": 0.0}},
    }
    weights = started(saved["translate"], tmp_path, model=model)
    translator = load_pretrained(saved["translate"])
    for name, tensor in translator.model.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(weights[name], tensor)
    new, old = load_pretrained(tmp_path).config, translator.config
    assert new.pooling == "mean" and new.encoder is not None and old.encoder is not None
    assert new.encoder.model_copy(update={"dropout": 0.0}) == old.encoder
    assert getattr(new.encoder, "dropout") == 0.25  # noqa: B009 - not every encoder has one


def test_the_same_architecture_takes_all_and_what_the_recipe_changes(saved: dict[str, Path], tmp_path: Path) -> None:
    optim = {"freeze": ["encoder.*", "head.*"], "optimizer": "sgd"}
    with pytest.raises(ConfigError, match="nothing to train"):
        started(saved["classify"], tmp_path / "all", optim=optim)
    weights = started(saved["classify"], tmp_path / "some", model={"dropout": 0.5, "pooling": "attention"}, optim=optim)
    old = load_pretrained(saved["classify"]).model.state_dict()
    assert all(torch.equal(weights[name], old[name]) for name in old)
    assert weights.keys() - old.keys() == {"pool.weight", "pool.bias"}
    assert load_pretrained(tmp_path / "some").config.dropout == 0.5


@pytest.mark.parametrize(
    ("kind", "model", "named"),
    [
        (
            "generate",
            {"architecture": "classifier", "encoder": {"recurrent": {"hidden_size": 24}}},
            r"model\.encoder\.recurrent\.hidden_size is 24, but model\.init_from has 16; remove it",
        ),
        (
            "generate",
            {"architecture": "classifier", "encoder": {"recurrent": {"bidirectional": True}}},
            r"model\.encoder\.recurrent\.bidirectional is True, but model\.init_from has False; remove it",
        ),
        (
            "classify",
            {"encoder": {"recurrent": {"cell": "lstm"}}},
            r"^model\.encoder\.recurrent\.cell is 'lstm', but model\.init_from has 'gru'; remove it$",
        ),
        ("classify", {"encoder": {"input": "image"}}, r"model\.encoder\.input is 'image', but .* has 'text'"),
        ("translate", {"decoder": {"recurrent": {"num_layers": 2}}}, r"model\.decoder\.recurrent\.num_layers is 2"),
        ("translate", {"decoder": {"attention": "additive"}}, r"model\.decoder\.attention is 'additive', .* has 'dot'"),
        ("translate", {"decoder": {"attention_gate": True}}, r"model\.decoder\.attention_gate is True, .* has False"),
        ("classify", {"encoder": {"characters": {}}}, r"encoder\.characters"),
    ],
)
def test_other_sizes_are_refused(
    saved: dict[str, Path], tmp_path: Path, kind: str, model: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        started(saved[kind], tmp_path, model=model)


def test_a_generator_does_not_start_from_a_classifier(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no decoder to start a generator from"):
        model = {"init_from": str(saved["classify"]), "architecture": "generator"}
        recipe("generate", tmp_path, data={"generated": "language-model"}, model=model)


def test_other_sizes_of_one_classifier(saved: dict[str, Path], tmp_path: Path) -> None:
    wide = {**CLASSIFIER["encoder"], "embedding_size": 99}
    with pytest.raises(ConfigError, match=r"model\.encoder\.embedding_size is 99, but model\.init_from has 16"):
        started(saved["classify"], tmp_path, model={"encoder": wide})


def test_a_finished_model_no_longer_needs_what_it_began_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = train(recipe(directory=tmp_path / "base"))
    begun = {"data": {"generated": "sentiment"}, "model": {"init_from": str(base)}}
    run = train(recipe(directory=tmp_path / "run", run={"max_steps": 40}, **begun))
    base.rename(tmp_path / "gone")
    for command in ("evaluate", "calibrate"):
        assert main([command, str(run)]) == 0, capsys.readouterr().err


def test_a_run_goes_on_with_the_model_that_it_began_with(tmp_path: Path, train_until: TrainUntil) -> None:
    """Whatever has become of the saved model that it was begun from."""
    base = train(recipe(directory=tmp_path / "base"))
    run = {"max_steps": 4, "save_steps": 2}
    begun = {"data": {"generated": "sentiment"}, "model": {"init_from": str(base)}, "run": run}
    whole = train(recipe(directory=tmp_path / "whole", **begun))
    train_until(recipe(directory=tmp_path / "cut", **begun), 3)
    other = load_pretrained(base)
    other.model.config = other.config.model_copy(update={"dropout": 0.5})
    for parameter in other.model.parameters():
        parameter.detach().zero_()
    other.save(base, "")
    cut = train(recipe(directory=tmp_path / "cut", **begun))
    for name in ("model.safetensors", "config.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_fewer_layers_than_the_saved_model_has(tmp_path: Path) -> None:
    deep = {**CLASSIFIER["encoder"], "recurrent": {"cell": "gru", "hidden_size": 16, "num_layers": 2}}
    first = train(recipe(directory=tmp_path / "deep", model={**CLASSIFIER, "encoder": deep}))
    weights = started(first, tmp_path / "shallow", model={"encoder": {"recurrent": {"num_layers": 1}}})
    old = load_pretrained(first).model.state_dict()
    kept = [name for name in weights if name.startswith("encoder.")]
    assert len(kept) < sum(name.startswith("encoder.") for name in old)
    assert all(torch.equal(weights[name], old[name]) for name in kept)


def test_another_task_than_the_saved_models_is_told_what_to_set(saved: dict[str, Path]) -> None:
    init_from = {"init_from": str(saved["generate"])}
    with pytest.raises(
        ConfigError, match=r"model\.init_from .* holds a model for 'generate'; set model\.architecture: c"
    ):
        recipe(data={"generated": "sentiment"}, model=init_from)


def test_a_saved_model_with_a_broken_config_is_named(tmp_path: Path) -> None:
    for text, fault in (("{", "Invalid JSON"), ('{"architecture": "classifier", "colour": 1}', "colour: Extra inputs")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ConfigError, match=rf"^model\.init_from is '.*', which cannot be loaded: config\.json: {fault}"
        ):
            recipe(data={"generated": "sentiment"}, model={"init_from": str(tmp_path)})
