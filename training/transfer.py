"""Starting from a saved model, `model.init_from`: which sizes and weights are taken over.

A model of the same architecture takes all; a classifier or tagger the encoder of another model, or the decoder of a
language model, which has learned to read by learning to go on (Dai and Le 2015; Howard and Ruder 2018).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqmodels.config import ModelConfig, TextEncoderConfig
from seqmodels.errors import ConfigError

if TYPE_CHECKING:  # a recipe is checked before torch, which takes seconds, is imported
    from torch import Tensor

OWN = ("head.", "pool.", "crf.")  # what a classifier or tagger learns anew
# Keys without whose saved value no saved weight has a place, and those that may be lowered but not raised.
SIZES = (
    "input", "cell", "hidden_size", "embedding_size", "channels", "in_channels",
    "attention", "attention_from", "attention_gate",
)  # fmt: skip
AT_MOST = ("num_layers", "blocks_per_stage", "bidirectional", "layer_norm")


def fields_from(saved: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new model, less what data decides: the saved one's, where `given`, the recipe's, has no other.

    Raises ConfigError where the two have nothing in common, or the recipe asks for sizes that the saved model lacks.
    """
    given = {name: value for name, value in given.items() if name != "init_from"}
    architecture = given.get("architecture", saved.architecture)
    if architecture == saved.architecture:
        learned = {"temperature": 1.0, "class_weights": {}, "target_mean": [], "target_std": []}
        return _begun(saved.model_dump(mode="json") | learned, given)
    if architecture == "generator":
        raise ConfigError(
            f"model.init_from holds a {saved.architecture}, which has no decoder to start a generator from; name a "
            "generator's directory"
        )
    return _begun({"encoder": _encoder(saved)}, given)


def weights_from(
    saved: ModelConfig, weights: "Mapping[str, Tensor]", new: "Mapping[str, Tensor]"
) -> "dict[str, Tensor]":
    """The saved weights that a new model takes over, by their names there. new: its own initial weights.

    Raises ConfigError where the recipe gives the new model other shapes.
    """
    if saved.encoder is None and any(name.startswith("encoder.") for name in new):
        weights = {name.replace("decoder.", "encoder.", 1): tensor for name, tensor in weights.items()}
    taken = {}
    for name, tensor in new.items():
        found = weights.get(name)
        if found is not None and found.shape == tensor.shape:
            taken[name] = found
        elif not name.startswith(OWN):
            there = f"in shape {tuple(found.shape)}" if found is not None else "nowhere"
            raise ConfigError(
                f"`model` asks for {name} in shape {tuple(tensor.shape)}, which model.init_from has {there}; remove "
                "the sizes from `model`, which come from the saved model"
            )
    return taken


def _encoder(saved: ModelConfig) -> dict[str, Any]:
    if saved.encoder is not None:
        return saved.encoder.model_dump(mode="json")
    assert saved.decoder is not None, "a model without an encoder is a language model"
    fields = saved.decoder.model_dump(mode="json")
    return {"input": "text"} | {name: fields[name] for name in TextEncoderConfig.model_fields if name in fields}


def _begun(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    _check_sizes(base, given, "model")
    return _merged(base, given)


def _check_sizes(base: Mapping[str, Any], given: Mapping[str, Any], place: str) -> None:
    for name in (name for name in given if name in base):
        now, was = given[name], base[name]
        if isinstance(now, Mapping) and isinstance(was, Mapping):
            _check_sizes(was, now, f"{place}.{name}")
        elif (name in SIZES and now != was) or (name in AT_MOST and isinstance(now, int) and now > was):
            raise ConfigError(f"{place}.{name} is {now!r}, but model.init_from has {was!r}; remove it")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base}
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
