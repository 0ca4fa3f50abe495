"""The weights that a run begins with: drawn anew, and in their place a saved model's as far as they fit."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.models import Model, build_model
from seqmodels.pretrained import load_pretrained
from training.config import some
from training.transfer import weights_from

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
