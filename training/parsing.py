"""From a YAML file and `key=value` overrides to a Recipe, and the words for what is wrong in them.

Knows files, and that a recipe's `model` section has to be a ModelConfig's; knows no data and no tensor.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from seqmodels.config import (
    ENCODERS,
    DecoderConfig,
    ModelConfig,
    PublishedBackboneConfig,
    TextEncoderConfig,
    explain,
    section_of,
    suggestion,
)
from seqmodels.errors import ConfigError
from seqmodels.yaml_files import parse_yaml, read_yaml
from training.config import Facts, Recipe, TokenizerSection

# What no recipe says of a model: the data decides it, or the format.
DECIDED = {"vocab_size", "feature_size", "labels", "max_source_length", "target_mean", "target_std", "temperature"}
DECIDED |= {"format_version", "pad_token_id", "bos_token_id", "eos_token_id"}
PATHS = {"data.path", "data.input_vectors", "data.target_vectors", "data.backbone_weights"}
PATHS |= {"model.init_from", "run.output_dir"}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key=value` overrides, check everything. Raises ConfigError."""
    fields = read_yaml(path, "recipe")
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {path} must hold keys such as `task` and `data`")
    for override in overrides:
        _apply(fields, override)
    _expand_home(fields)
    fields.setdefault("run", {})
    if isinstance(fields["run"], dict) and fields["run"].get("output_dir") is None:
        fields["run"]["output_dir"] = f"models/{path.stem}"
    return parse_recipe(fields)


def differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, was, now) wherever two recipes, as plain data, are not alike."""
    if key == "optim.learning_rate_factors" and was and now:  # the first pattern that matches counts
        was, now = [{name: factor} for name, factor in was.items()], [{name: factor} for name, factor in now.items()]
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            yield from differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif was != now:
        yield key, was, now


def parse_recipe(fields: Mapping[str, Any]) -> Recipe:
    """Build from plain data. Raises ConfigError that names key, value and what is allowed."""
    try:
        recipe = Recipe.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    except (TypeError, ValueError, RecursionError) as error:  # of json: a date, an anchor that holds itself
        raise ConfigError(f"recipe holds a value that is no plain data: {error}") from None
    _check_model(recipe)
    return recipe


def _check_model(recipe: Recipe) -> None:
    for part, name in (("encoder", "vocab_size"), ("encoder", "feature_size"), ("decoder", "vocab_size")):
        section = recipe.model.get(part)
        if isinstance(section, dict) and name in section:
            raise ConfigError(f"model.{part}.{name} is decided by the data; remove it")
    for name in ("labels", "max_source_length"):
        if name in recipe.model:
            fix = "name them in data.label_names" if name == "labels" else "use data.max_input_length"
            raise ConfigError(f"model.{name} is decided by the data; {fix}")
    for name, by in (("target_mean", "the data"), ("target_std", "the data"), ("temperature", "training calibrate")):
        if name in recipe.model:
            raise ConfigError(f"model.{name} is decided by {by}; remove it")
    try:
        config = recipe.model_config_with(Facts.unknown())
    except ConfigError as error:
        raise ConfigError(_with_neighbour(f"model.{str(error).removeprefix('model.')}", recipe.model)) from None
    if config.task != recipe.task:
        _refuse_task(recipe, config)
    _check_single_layers(recipe, config)
    _check_parts(recipe, config)
    _check_r_drop(recipe, config)
    _check_vectors(recipe, config)
    _check_tokenizer(recipe, config)
    _check_backbone(recipe, config)
    if recipe.data.augmentation is not None and config.input != "image":
        raise ConfigError(f"data.augmentation is of pictures, but the model reads {config.input}; remove it")
    if recipe.data.chunk_length == 1 and config.decoder and config.decoder.temporal_activation_penalty:
        raise ConfigError(
            "model.decoder.temporal_activation_penalty does nothing where data.chunk_length is 1: a single step has no "
            "change; raise it"
        )
    if recipe.run.workers > 1 and config.input in ("image", "frames"):
        raise ConfigError(
            f"run.workers is {recipe.run.workers}, but model.encoder.backbone normalises by the statistics of a whole "
            "batch, of which each worker would see its own rows alone; set run.workers=1 and raise run.threads"
        )


def _check_single_layers(recipe: Recipe, config: ModelConfig) -> None:
    """What the recipe itself sets, not in ModelConfig: a saved model with such a setting can still be used."""
    effects = {"dropout": "acts between layers", "residual": "acts from the second layer on"}
    for part, (name, where) in product(("encoder", "decoder"), effects.items()):
        recurrent = getattr(getattr(config, part), "recurrent", None)
        value = (recipe.model.get(part) or {}).get("recurrent", {}).get(name)
        if recurrent is not None and recurrent.num_layers == 1 and value:
            raise ConfigError(
                f"model.{part}.recurrent.{name} is {value}, but {where}, and num_layers is 1; remove {name}, or raise "
                "num_layers"
            )
    decoder = config.decoder
    if (
        decoder
        and decoder.attention_from == "first"
        and decoder.recurrent.residual
        and decoder.recurrent.num_layers == 2
    ):
        raise ConfigError(
            "model.decoder.recurrent.residual is true, but with attention_from: first it acts from the second layer "
            "above the first on, and num_layers is 2; remove residual, or raise num_layers"
        )


def _check_parts(recipe: Recipe, config: ModelConfig) -> None:
    """What the recipe itself sets and no part of the model reads, not in ModelConfig: see `_check_single_layers`."""
    model, encoder = recipe.model, recipe.model.get("encoder") or {}
    if model.get("dropout") and config.architecture == "generator":
        raise ConfigError(
            "model.dropout is of a classifier's or tagger's last layer, but the model is a generator; set "
            "model.decoder.dropout, or remove it"
        )
    if "pooling" in model and config.architecture != "classifier":
        raise ConfigError(f"model.pooling is for classifiers, but the model is a {config.architecture}; remove it")
    if encoder.get("summary_dropout") and config.architecture == "classifier" and config.pooling != "last":
        raise ConfigError(
            f"model.encoder.summary_dropout is of a picture's one vector, but model.pooling is {config.pooling!r}, "
            "which reads its grid; set model.encoder.dropout, or remove it"
        )


def _check_r_drop(recipe: Recipe, config: ModelConfig) -> None:
    if recipe.run.r_drop is None:
        return
    if config.problem_type == "regression":
        raise ConfigError("run.r_drop is of probabilities, and the model answers with numbers; remove it")
    if not any(_draws_by_row(part) for part in (config, config.encoder, config.decoder)):
        raise ConfigError(
            f"run.r_drop is {recipe.run.r_drop}, but nothing differs from one reading of a row to the next: set a "
            "dropout or zoneout above 0 (embedding_dropout and weight_dropout are the same for all rows), or remove it"
        )


def _draws_by_row(part: object) -> bool:
    """Whether a part of the model drops something of each row anew."""
    names = ("dropout", "input_dropout", "summary_dropout", "zoneout", "cell_zoneout")
    recurrent = getattr(part, "recurrent", None)
    return any(getattr(part, name, 0.0) for name in names) or (recurrent is not None and _draws_by_row(recurrent))


def _refuse_task(recipe: Recipe, config: ModelConfig) -> NoReturn:
    architecture = {"classify": "classifier", "tag": "tagger"}.get(recipe.task, "generator")
    if architecture == config.architecture:  # then what the model reads tells the tasks apart
        fix = f"the model reads {config.input}; set task: {config.task}, or change the model's encoder"
    else:
        fix = f"set model.architecture: {architecture}, or task: {config.task}"
    where = "the `model` section describes"
    if recipe.init_from is not None and "architecture" not in recipe.model:
        where = f"model.init_from {recipe.init_from} holds"
    raise ConfigError(f"task is {recipe.task!r}, but {where} a model for {config.task!r}; {fix}")


def _check_vectors(recipe: Recipe, config: ModelConfig) -> None:
    data, there = recipe.data, {"input_vectors": config.input == "text", "target_vectors": recipe.makes_text}
    for name, has_words in there.items():
        if getattr(data, name) is None:
            continue
        field = f"data.{name} is {getattr(data, name)!r}"
        if not has_words:
            what = "reads" if name == "input_vectors" else "writes"
            raise ConfigError(f"{field}, but the model {what} no text; remove it")
        if recipe.init_from is not None:
            raise ConfigError(f"{field}, but model.init_from brings the saved model's embeddings; remove one of them")
        if data.tokenizer.kind != "word":
            raise ConfigError(
                f"{field}, a file of words, but data.tokenizer.kind is {data.tokenizer.kind!r}; set it to word"
            )


def _check_tokenizer(recipe: Recipe, config: ModelConfig) -> None:
    if recipe.data.tokenizer != TokenizerSection() and config.input != "text" and not recipe.makes_text:
        raise ConfigError(f"data.tokenizer is set, but the model reads {config.input} and writes no text; remove it")
    if not recipe.data.tokenizer.dropout:
        return
    field = f"data.tokenizer.dropout is {recipe.data.tokenizer.dropout}"
    if recipe.task in ("generate", "tag"):
        what = "one running text" if recipe.task == "generate" else "texts with a label for each word"
        raise ConfigError(f"{field}, but task {recipe.task} reads {what}, which is split once for all; remove it")


def _check_backbone(recipe: Recipe, config: ModelConfig) -> None:
    if recipe.data.backbone_weights is None:
        return
    field = f"data.backbone_weights is {recipe.data.backbone_weights!r}"
    backbone = getattr(config.encoder, "backbone", None)
    if not isinstance(backbone, PublishedBackboneConfig):
        raise ConfigError(
            f"{field}, but the model has no backbone of which weights are published; set model.encoder.backbone.kind "
            "to resnet18, resnet34, resnet50, resnet101 or mobilenet_v2, or remove it"
        )
    if recipe.init_from is not None:
        raise ConfigError(f"{field}, but model.init_from brings the saved model's backbone; remove one of them")


def _apply(fields: dict[str, Any], override: str) -> None:
    """Set one dotted key, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override; write key=value, such as run.seed=2")
    try:
        plain = key in PATHS and text not in ("", "null", "~") and text[0] not in "'\""
        value = text if plain else parse_yaml(text)  # in a path `: ` and ` #` mean nothing
    except (yaml.MarkedYAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {key}: {text!r} is not YAML; quote it") from None
    except yaml.YAMLError as error:  # our own
        raise ConfigError(f"override {key}: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    for parent in parents:
        inner = fields.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {key}: {parent} is {inner!r}, which has no keys")
        fields = inner
    fields[last] = value


def _expand_home(fields: dict[str, Any]) -> None:
    """A shell leaves the ~ of `data.path=~/texts` as it is, and YAML does too."""
    for section, name in (key.split(".") for key in PATHS):
        inner = fields.get(section)
        if not isinstance(inner, dict):
            continue
        value = inner.get(name)
        if isinstance(value, str) and value.startswith("~/"):
            inner[name] = str(Path.home() / value[2:])


def _explain(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "value_error":  # our own words, which name the whole key
        return str(fault["msg"]).removeprefix("Value error, ")
    return explain(error, Recipe)


def _with_neighbour(message: str, model: Mapping[str, Any]) -> str:
    """Where the fault is an unknown key, what it may have been: a key of another section, or the nearest of its own."""
    unknown = re.match(r"([\w.]+): Extra inputs are not permitted", message)
    if unknown is None:
        return message
    key = unknown.group(1)
    section, _, name = key.rpartition(".")
    places: dict[str, list[str]] = {}  # by the last part of a key: the sections that have one
    for known in _model_keys(model):
        place, _, last = known.rpartition(".")
        places.setdefault(last, []).append(place)
    here = [last for last, sections in places.items() if section in sections]
    near = difflib.get_close_matches(name, here, n=1) or difflib.get_close_matches(name, places, n=1)
    meant = name if name in places else near[0] if near else ""
    if not meant or section in places[meant]:
        return f"{key} is no setting{suggestion(name, here)}"
    return f"{key} is no setting; did you mean {' or '.join(f'{place}.{meant}' for place in places[meant])}?"


def _model_keys(model: Mapping[str, Any]) -> Iterator[str]:
    """Every key, from `model` on, that a recipe with this `model` section may set."""
    yield "model.init_from"
    yield from _keys(ModelConfig, "model")
    encoder = model.get("encoder")
    if isinstance(encoder, dict) or "decoder" not in model:
        kind = str(encoder.get("input")) if isinstance(encoder, dict) else "text"
        yield from _keys(ENCODERS.get(kind, TextEncoderConfig), "model.encoder")
    if "decoder" in model or "init_from" in model:
        yield from _keys(DecoderConfig, "model.decoder")


def _keys(section: type[BaseModel], place: str) -> Iterator[str]:
    for name in section.model_fields:
        if name not in DECIDED:
            yield f"{place}.{name}"
        if name != "decoder" and (inner := section_of(section, name)) is not None:
            yield from _keys(inner, f"{place}.{name}")
