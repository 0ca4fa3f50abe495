"""The weights that a run begins with: drawn anew, and in their place a saved model's as far as they fit, or what others
have trained: word vectors, a backbone.

What a run needs of the latter is kept in its directory before step 0, so that going on does not depend on their files.
"""

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.errors import CheckpointError, ConfigError
from seqmodels.models import Model, build_model
from seqmodels.pretrained import load_pretrained
from seqmodels.vision import Backbone, build_backbone
from training import checkpoint
from training.config import DataSection, Recipe, some
from training.transfer import weights_from

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
    if saved.config.labels != model.config.labels:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("head.", "crf."))}
    model.load_state_dict(weights, strict=False)
    new = {name.split(".")[0] for name in model.state_dict().keys() - weights.keys()}
    say(f"begun from {directory}{f', but for the new {some(sorted(new))}' if new else ', all of it'}")


def keep_begin(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Keep for the run that begins here what others have trained, by names of the model's, and nothing else."""
    (directory / BEGIN).unlink(missing_ok=True)
    if weights:
        with checkpoint.writing_whole(directory / BEGIN) as temporary:
            save_file(dict(weights), temporary)


def begin_as_kept(model: Model, data: DataSection, directory: Path) -> None:
    """Put in what `keep_begin` has kept, if the recipe names any; NaN stands where the initial weight remains.

    Raises CheckpointError where it is gone.
    """
    if not (data.input_vectors or data.target_vectors or data.backbone_weights):
        return
    try:
        found = load_file(directory / BEGIN)
    except (OSError, SafetensorError):
        raise CheckpointError(
            f"{directory / BEGIN} is gone or broken, so the run cannot begin with its weights; remove the directory to "
            "start again"
        ) from None
    weights = model.state_dict()
    for name, tensor in found.items():
        weights[name].copy_(torch.where(tensor.isnan(), weights[name], tensor))


def frozen_backbone(recipe: Recipe, config: ModelConfig, directory: Path) -> Backbone | None:
    """The backbone as it is from before the first step to the end; None where it learns, or begins with weights that
    are drawn, or there is none."""
    backbone_config = getattr(config.encoder, "backbone", None)
    if backbone_config is None or not (recipe.data.backbone_weights or recipe.init_from):
        return None
    if backbone_config.output_size == backbone_config.in_channels:  # nothing would tell its grids from pictures
        return None
    backbone = build_backbone(backbone_config)
    names = [f"{BACKBONE}{name}" for name, _ in backbone.named_parameters()]
    if not all(any(fnmatchcase(name, pattern) for pattern in recipe.optim.freeze) for name in names):
        return None
    if recipe.init_from is not None:
        found: Mapping[str, Tensor] = load_pretrained(recipe.init_from).model.state_dict()
    else:
        found = load_file(directory / BEGIN)
    weights = {name.removeprefix(BACKBONE): found[name] for name in found if name.startswith(BACKBONE)}
    backbone.load_state_dict(weights)
    return backbone.to(recipe.run.device).eval()
