"""The weights that a run begins with: drawn anew, and in their place a saved model's as far as they fit, or what others
have trained: word vectors, a backbone.

What a run needs of the latter is kept in its directory before step 0, so that going on does not depend on their files.
"""

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqmodels.config import ModelConfig, PublishedBackboneConfig
from seqmodels.errors import CheckpointError, ConfigError
from seqmodels.models import Model, build_model
from seqmodels.pretrained import load_pretrained
from seqmodels.vision import Backbone, build_backbone
from training import checkpoint
from training.config import Recipe, some
from training.transfer import OWN, weights_from

BEGIN = "begin.safetensors"
BACKBONE = "encoder.backbone."  # what the names of its parameters begin with
TOO_LARGE = "the model is too large for this machine's memory; lower the sizes in `model`"


def check_memory(config: ModelConfig) -> None:
    """Raises ConfigError for a model that this machine cannot hold, before the system has to end the process."""
    try:
        with torch.device("meta"):  # shapes alone
            needed = sum(4 * parameter.numel() for parameter in build_model(config).parameters())
    except (RuntimeError, TypeError, OverflowError):  # a size that no tensor can have
        raise ConfigError(TOO_LARGE) from None
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ConfigError(TOO_LARGE)


def new_model(config: ModelConfig) -> Model:
    """Weights drawn from torch's global generator. Raises ConfigError where there is no memory for them."""
    try:
        return build_model(config)
    except (RuntimeError, MemoryError):  # the allocator's
        raise ConfigError(TOO_LARGE) from None


def begin_from(directory: Path, model: Model, say: Callable[[str], None]) -> None:
    """Overwrite the weights with those of a saved model that have a place here; `say` is told which parts are new."""
    saved = load_pretrained(directory)
    weights = weights_from(saved.config, saved.model.state_dict(), model.state_dict())
    if _asked(saved.config) != _asked(model.config):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(OWN)}
    elif saved.config.labels != model.config.labels:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("head.", "crf."))}
    model.load_state_dict(weights, strict=False)
    new = {name.split(".")[0] for name in model.state_dict().keys() - weights.keys()}
    say(f"begun from {directory}{f', but for the new {some(sorted(new))}' if new else ', all of it'}")


def _asked(config: ModelConfig) -> tuple[str, str]:
    """What its head answers."""
    return config.architecture, config.problem_type


def keep_begin(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Keep for the run that begins here what others have trained, by names of the model's, and nothing else."""
    (directory / BEGIN).unlink(missing_ok=True)
    if weights:
        with checkpoint.writing_whole(directory / BEGIN) as temporary:
            save_file(dict(weights), temporary)


def begin_as_kept(model: Model, recipe: Recipe, directory: Path) -> None:
    """Put in what `keep_begin` has kept, if the recipe names any; NaN stands where the initial weight remains.

    Raises CheckpointError where it is gone.
    """
    data = recipe.data
    if not (data.input_vectors or data.target_vectors or data.backbone_weights):
        return
    weights = model.state_dict()
    for name, tensor in _kept(directory).items():
        weights[name].copy_(torch.where(tensor.isnan(), weights[name], tensor))


def frozen_weights(recipe: Recipe, config: ModelConfig) -> dict[str, Tensor]:
    """To be kept too, by names of the model's: of a backbone that does not learn and comes with `model.init_from`,
    whose files may change while the run goes on."""
    if recipe.init_from is None or not _is_frozen(recipe, config):
        return {}
    saved = load_pretrained(recipe.init_from).model.state_dict()
    return {name: tensor for name, tensor in saved.items() if name.startswith(BACKBONE)}


def frozen_backbone(recipe: Recipe, config: ModelConfig, directory: Path) -> Backbone | None:
    """The backbone as it is from before the first step to the end; None where it learns, or begins with weights that
    are drawn, or there is none. Raises CheckpointError where its weights are gone."""
    if not _is_frozen(recipe, config):
        return None
    backbone = build_backbone(_backbone_config(config))
    kept = _kept(directory)
    backbone.load_state_dict({name.removeprefix(BACKBONE): kept[name] for name in kept if name.startswith(BACKBONE)})
    return backbone.to(recipe.run.device).eval()


def check_frozen(recipe: Recipe, config: ModelConfig) -> None:
    """Raises ConfigError where a backbone of published weights would keep those that were drawn for it."""
    is_published = isinstance(_backbone_config(config), PublishedBackboneConfig)
    if is_published and _holds_backbone(recipe, config) and not _brings_weights(recipe):
        raise ConfigError(
            "optim.freeze holds the whole backbone, but data.backbone_weights names no weights, so that it would see "
            "at random for ever; name some, or let it learn"
        )


def _is_frozen(recipe: Recipe, config: ModelConfig) -> bool:
    if not _brings_weights(recipe) or not _holds_backbone(recipe, config):
        return False
    backbone = _backbone_config(config)
    return bool(backbone.output_size != backbone.in_channels)  # else nothing would tell its grids from pictures


def _brings_weights(recipe: Recipe) -> bool:
    """Of a backbone that others have trained."""
    return bool(recipe.data.backbone_weights or recipe.init_from)


def _holds_backbone(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether there is one of which nothing learns."""
    backbone = _backbone_config(config)
    if backbone is None:
        return False
    with torch.device("meta"):
        names = [f"{BACKBONE}{name}" for name, _ in build_backbone(backbone).named_parameters()]
    return all(any(fnmatchcase(name, pattern) for pattern in recipe.optim.freeze) for name in names)


def _backbone_config(config: ModelConfig) -> Any:
    return getattr(config.encoder, "backbone", None)


def _kept(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / BEGIN)
    except (OSError, SafetensorError):
        raise CheckpointError(
            f"{directory / BEGIN} is gone or broken, so the run cannot begin with its weights; remove the directory to "
            "start again"
        ) from None
