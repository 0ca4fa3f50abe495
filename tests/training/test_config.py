"""Recipes: strict, with the nearest known key where one is misspelt."""

from pathlib import Path
from typing import Any

import pytest

from seqmodels.errors import ConfigError
from tests.training.recipes import (
    CLASSIFIER,
    DECODER,
    LANGUAGE_MODEL,
    TAGGER,
    TEXT_ENCODER,
    TRANSLATOR,
    WORDS,
    fields,
)  # fmt: skip
from training.config import Facts
from training.parsing import load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent.parent
ALL_RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DEMO = ROOT / "recipes" / "demo" / "sentiment.yaml"
PAIRS = {"generated": "numbers-en-fr"}
SERIES = {"architecture": "classifier", "encoder": {"input": "features", "recurrent": {"hidden_size": 8}}}
PICTURES = {"architecture": "classifier", "pooling": "mean", "encoder": {"input": "image", "summary_dropout": 0.5}}
NAMED = {"sst2", "imdb", "multi30k-en-de", "multi30k-en-fr", "tatoeba-de-en", "ptb", "tinyshakespeare"}
NAMED |= {"ud-english-ewt", "conll2000", "sentiment", "numbers-en-fr", "captions", "number-tags"}
NAMED |= {"frames", "clips", "clip-captions", "series", "language-model", "adding", "copy", "digits"}
NAMED |= {"imdb-lm", "imdb-from-lm", "imdb-lm-large", "imdb-from-lm-large"}
NAMED |= {"flickr8k-show-and-tell", "flickr8k-attention", "flickr8k-attention-finetune"}
NAMED |= {"flickr8k-attention-self-critical"}
NAMED |= {"multi30k-en-de-student", "multi30k-en-de-self-critical", "ptb-medium", "ptb-awd"}
# What a recipe starts from, and the recipe that makes it.
BEGUN_BY = {"imdb-from-lm": "imdb-lm", "imdb-from-lm-large": "imdb-lm-large"}
BEGUN_BY |= {"multi30k-en-de-self-critical": "multi30k-en-de"}
BEGUN_BY |= dict.fromkeys(("flickr8k-attention-finetune", "flickr8k-attention-self-critical"), "flickr8k-attention")


def test_all_recipes_are_there() -> None:
    assert {path.stem for path in ALL_RECIPES} == NAMED


@pytest.mark.parametrize("path", ALL_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if first := BEGUN_BY.get(path.stem):
        made = load_recipe(path.with_name(f"{first}.yaml"))
        directory = tmp_path / made.run.output_dir if made.run.output_dir else tmp_path
        directory.mkdir(parents=True)
        made.model_config_with(Facts.unknown()).save(directory / "config.json")
        monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert (recipe.init_from is not None) == bool(first)
    assert recipe.run.output_dir == f"models/{path.stem}"


def test_overrides_go_before_the_file_and_are_read_as_yaml() -> None:
    recipe = load_recipe(DEMO, ["run.seed=7", "optim.learning_rate=1e-4", "model.encoder.recurrent.cell=gru"])
    assert recipe.run.seed == 7
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.model["encoder"]["recurrent"]["cell"] == "gru"


def test_a_path_is_taken_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    for given, read in (
        ("a #1: b", "a #1: b"), ("~/m #2", "/home/anna/m #2"), ("'~/m'", "/home/anna/m"), ("2024", "2024"),
        ("null", "models/sentiment"), ("~", "models/sentiment"), ("", "models/sentiment"), ("~anna/m", "~anna/m"),
    ):  # fmt: skip
        assert load_recipe(DEMO, [f"run.output_dir={given}"]).run.output_dir == read


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.sed=3", ["run.sed", "did you mean seed"]),
        ("otpim.learning_rate=1", ["otpim", "did you mean optim"]),
        ("optim.leaning_rate=1", ["optim.leaning_rate", "did you mean learning_rate"]),
        ("data.tokenizer.vocabsize=9", ["data.tokenizer.vocabsize", "did you mean vocab_size"]),
        ("model.encoder.embeding_size=8", ["embeding_size", "did you mean embedding_size"]),
        ("model.encoder.recurrent.cell=lsmt", ["model.encoder.recurrent.cell: ", "lsmt", "lstm"]),
        ("model.encoder.text.recurrent.zoneout=0.1", ["model.encoder.text is no setting; known here: characters, dr"]),
        ("model.locked_dropout=true", ["model.locked_dropout", "did you mean model.encoder.locked_dropout?"]),
        ("model.encoder.poling=max", ["model.encoder.poling", "did you mean model.pooling?"]),
        ("model.anything=1", ["model.anything is no setting; known here: architecture, class_weights, crf, decoder, "]),
        ("model.encoder.recurrent.dropout=0.2", ["model.encoder.recurrent.dropout is 0.2", "num_layers is 1"]),
        ("model.encoder.recurrent.residual=true", ["model.encoder.recurrent.residual is True", "num_layers is 1"]),
        ("run.threads=20000", ["run.threads", "less than or equal to 1024 (got 20000)"]),
        ("optim.learning_rate=1e30", ["optim.learning_rate", "less than or equal to 1000"]),
        (
            "optim.learning_rate_factors={head: 1e30}",
            ["optim.learning_rate_factors.head", "less than or equal to 1000"],
        ),
        ("optim.gradient_noise=1e30", ["optim.gradient_noise", "less than or equal to 1000"]),
        ("run.seed=first", ["run.seed", "first"]),
        ("run.seed", ["run.seed", "key=value"]),
        ("run.tokens_per_batch.deeper=1", ["tokens_per_batch", "no keys"]),
        ("run.metric_for_best_model=bleu", ["bleu", "accuracy"]),
        ("optim.momentum=0.9", ["optim.momentum", "adam", "sgd"]),
        ("optim.nesterov=true", ["nesterov", "sgd"]),
        ("optim.lr_scheduler_type=inverse_sqrt", ["inverse_sqrt", "warmup_steps"]),
        ("optim.plateau_patience=3", ["plateau"]),
        ("optim.num_cycles=3", ["optim.num_cycles", "cosine_with_restarts"]),
        ("optim.lr_scheduler_type=cosine_with_restarts", ["optim.num_cycles", "cosine_with_restarts"]),
        ("run.keep_snapshots=true", ["run.keep_snapshots", "cosine_with_restarts"]),
        ("run.fp16=true", ["run.fp16", "run.device=cuda", "run.bf16"]),
        ("data.vary_chunk_length=true", ["data.vary_chunk_length", "classify"]),
        ("generation.num_beams=4", ["generation", "classify"]),
        ("data.path=somewhere", ["data.generated", "data.path"]),
        ("model.labels=[a,b]", ["model.labels", "data.label_names"]),
        ("model.encoder.vocab_size=9", ["vocab_size", "decided by the data"]),
        ("model.init_from=nowhere", ["init_from"]),
        ("model={init_from: 5}", ["model.init_from is 5", "path"]),
        ("model.temperature=2.0", ["model.temperature", "training calibrate"]),
        ("model.target_std=[1.0]", ["model.target_std", "decided by the data"]),
        ("task=tag", ["task is 'tag'", "set model.architecture: tagger, or task: classify"]),
        ("run.seed=9223372036854775808", ["run.seed", "less than 9223372036854775808"]),
        ("data.tokenizer={kind: byte, vocab_size: 300}", ["data.tokenizer.vocab_size", "byte", "remove it"]),
        ("data.tokenizer={kind: word, dropout: 0.1}", ["data.tokenizer.dropout", "'bpe'", "'word'", "remove it"]),
        ("data.tokenizer={kind: bpe, dropout: 1.0}", ["data.tokenizer.dropout", "less than 1"]),
        ('data.label_names=[one, "7"]', ["class number 1", "'7'", "use words"]),
        ("data.max_target_length=9", ["data.max_target_length", "classify"]),
        ("data=&a [*a]", ["no plain data", "Circular"]),
        ("model.encoder={recurrent: {cell: lstm}}", ["model.encoder.input is missing; set it to one of text, image"]),
        ("run={seed: 1, seed: 2}", ["override run: 'seed' stands twice"]),
        ("run.seed=2024-13-45", ["run.seed", "not YAML"]),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_fix(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(DEMO, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"run": {"max_steps": None}}, "no end"),
        ({"run": {"bf16": True, "fp16": True, "device": "cuda"}}, "choose one"),
        ({"data": {}}, "no source"),
        ({"data": {"path": "x"}}, "data.columns"),
        ({"data": {"path": "x", "revision": "abc", "columns": {"input": "a", "target": "b"}}}, "data.id"),
        ({"data": {"path": "x", "columns": {"target": "b"}}}, "data.columns.input"),
        ({"model": LANGUAGE_MODEL}, "generate"),
        ({"model": {"init_from": "x"}}, "data.tokenizer"),
        ({"data": {"generated": "sentiment", "chunk_length": 9}}, "data.chunk_length"),
        ({"data": {"path": "x", "columns": {"input": "a", "target": ["b", "c"]}}}, "data.columns.target is a list"),
        ({"data": {"path": "x", "columns": {"input": "a", "target": []}}}, "data.columns.target"),
        (
            {"data": {"path": "x", "columns": {"input": "a", "target": ["y", "y"]}}},
            r"data\.columns\.target names 'y' twice; name each column once",
        ),
        ({"task": "caption", "model": TRANSLATOR}, "the model reads text; set task: translate"),
        ({"task": "translate", "model": {**TRANSLATOR, "dropout": 0.5}, "data": PAIRS}, r"model\.dropout is of a"),
        (
            {"task": "translate", "model": {**TRANSLATOR, "pooling": "max"}, "data": PAIRS},
            r"model\.pooling is for clas",
        ),
        ({"task": "tag", "model": {**TAGGER, "pooling": "max"}}, r"model\.pooling is for classifiers"),
        ({"model": PICTURES, "data": {"generated": "captions"}}, r"model\.encoder\.summary_dropout is of a pict"),
        ({"model": SERIES, "data": {"generated": "series", "tokenizer": WORDS}}, r"data\.tokenizer is set, but the mo"),
        ({"data": {"generated": "sentiment", "label_names": ["a", "b"]}}, r"remove data\.label_names and data\.splits"),
        ({"data": {"generated": "sentiment", "splits": {"test": "x"}}}, r"remove data\.label_names and data\.splits"),
    ],
)
def test_settings_that_contradict_each_other(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_recipe(fields(**change))


def test_a_key_of_both_sides_is_told_with_both_places() -> None:
    with pytest.raises(ConfigError, match=r"did you mean model\.encoder\.locked_dropout or model\.decoder\.locked_dro"):
        parse_recipe(fields("translate", model={**TRANSLATOR, "locked_dropout": True}))


def test_dropout_between_layers_and_residual_connections_of_two_layers_are_fine() -> None:
    for setting in ({"dropout": 0.2}, {"residual": True}):
        recurrent = {**TEXT_ENCODER["recurrent"], "num_layers": 2, **setting}
        parse_recipe(fields(model={**CLASSIFIER, "encoder": {**TEXT_ENCODER, "recurrent": recurrent}}))


def test_a_missing_file_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        ({"locked_dropout": True}, {}, r"model\.decoder: locked_dropout does nothing"),
        ({"temporal_activation_penalty": 1.0}, {"chunk_length": 1}, "does nothing where data.chunk_length is 1"),
        ({"activation_penalty": -1.0}, {}, "activation_penalty"),
        ({"weight_dropout": 0.5}, {}, r"model\.decoder\.weight_dropout is no setting"),
        ({"embedding_dropout": 1.0}, {}, "embedding_dropout"),
        ({"recurrent": {"cell": "gru", "cell_zoneout": 0.1}}, {}, r"model\.decoder\.recurrent: cell_zoneout is 0\.1"),
        ({"recurrent": {"cell": "min_gru", "layer_norm": True}}, {}, "layer_norm is True, but min_gru has no"),
    ],
)
def test_regularisation_that_does_nothing_is_refused(options: dict[str, Any], data: dict[str, Any], words: str) -> None:
    model = {**LANGUAGE_MODEL, "decoder": {**DECODER, **options}}
    with pytest.raises(ConfigError, match=words):
        parse_recipe(fields("generate", model=model, data={"generated": "language-model", **data}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"task: caf\xe9\n", r"is not UTF-8 \(byte 0xe9 at 9\)"),
        (b"task: classify\ndata: &a\n  self: *a\n", "no plain data"),
        (b"task: 2024-13-45\n", "is not YAML"),
        (b"task: 2024-11-25\n", "no plain data"),
        (b"[" * 1500, "is not YAML"),
        (b"run: {seed: 1}\ntask: tag\nrun: {seed: 2}\n", "is not YAML: 'run' stands twice, in lines 1 and 3; keep one"),
        (b"run: {seed: 1, bf16: true, seed: 2}\n", "'seed' stands twice, in lines 1 and 1"),
        (b"run:\n  seed: 1\n  bf16: true\n  seed: 2\n", "'seed' stands twice, in lines 2 and 4"),
    ],
)
def test_a_recipe_that_cannot_be_read_says_why(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


def test_a_language_model_has_no_longest_target() -> None:
    made = fields("generate", model=LANGUAGE_MODEL, data={"generated": "language-model", "max_target_length": 9})
    with pytest.raises(ConfigError, match=r"data\.max_target_length does nothing for task generate"):
        parse_recipe(made)


def test_residuals_that_no_layer_adds_are_refused() -> None:
    recurrent = {"hidden_size": 8, "num_layers": 2, "residual": True}
    decoder = {**DECODER, "attention": "dot", "attention_from": "first", "recurrent": recurrent}
    encoder = {**TEXT_ENCODER, "recurrent": {"hidden_size": 8}}
    made = {"model": {**TRANSLATOR, "encoder": encoder, "decoder": decoder}, "data": {"generated": "numbers-en-fr"}}
    with pytest.raises(ConfigError, match="residual is true, but with attention_from: first"):
        parse_recipe(fields("translate", **made))
    recurrent["num_layers"] = 3
    parse_recipe(fields("translate", **made))
