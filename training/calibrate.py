"""Calibration: the one number by which a classifier's or tagger's logits are divided so that its probabilities mean
what they say (Guo et al. 2017). Which label is the likeliest never changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.errors import ConfigError, DataError
from seqmodels.losses import IGNORE
from seqmodels.models import Model
from seqmodels.pretrained import CARD, load_pretrained
from training.config import Recipe, some
from training.data.batches import Buckets
from training.data.examples import Codec
from training.data.rows import Row
from training.evaluate import rows_to_score

COLDEST, HOTTEST = 0.05, 20.0  # the bounds of a temperature; where all answers are right, none is cold enough
TOKENS_PER_BATCH, ROWS_PER_BATCH = 8192, 128
NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The temperature, and nll and expected calibration error on the validation split, before it and with it."""

    temperature: float
    nll: tuple[float, float]
    error: tuple[float, float]


def calibrate(directory: Path, recipe: Recipe) -> Calibration:
    """Fit the temperature on the validation split and write it into the model directory.

    Raises ConfigError for a model that gives no probabilities of labels, DataError where the split may hold rows that
    it was trained on or no temperature fits, ModelDirectoryError.
    """
    saved = load_pretrained(directory, recipe.run.device)
    if saved.config.architecture == "generator" or saved.config.problem_type == "regression":
        raise ConfigError(f"{directory} gives no probabilities of labels; only classifiers and taggers are calibrated")
    config = saved.config.model_copy(update={"temperature": 1.0})
    saved.model.config = config
    rows = rows_to_score(directory, recipe, "validation")["validation"]
    logits, labels = _validation_logits(saved.model, Codec.of(saved, recipe.data), rows, recipe.run.device)
    temperature = fit_temperature(logits, labels)
    if not fits(temperature):
        raise DataError(
            f"the temperature would be {temperature:.4f}, as far as it may go: on the validation split the model is "
            f"always right, or guesses; {directory} is left as it was; give rows of which it gets some wrong, or train "
            "it longer"
        )
    saved.model.config = config.model_copy(update={"temperature": temperature})
    card = (directory / CARD).read_text(encoding="utf-8") if (directory / CARD).is_file() else ""
    saved.save(directory, card)
    nll, error = zip(*(_quality(logits / t, labels) for t in (1.0, temperature)), strict=True)
    return Calibration(temperature, nll, error)


@torch.no_grad()
def _validation_logits(model: Model, codec: Codec, rows: Sequence[Row], device: str) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of all that is labelled in the validation split, in float64."""
    examples = codec.encode(rows)
    batches = Buckets(examples, codec, TOKENS_PER_BATCH, ROWS_PER_BATCH, seed=0)
    found = []
    for index in range(len(batches)):
        batch = {name: value.to(device) for name, value in batches.batch(0, index).items()}
        found.append(model.target_logits(**batch)[:2])
    logits = torch.cat([logits.flatten(0, -2) for logits, _ in found]).double().cpu()
    labels = torch.cat([labels.flatten() for _, labels in found]).cpu()
    if not (labels != IGNORE).any():
        known = some(codec.config.labels)
        raise DataError(f"no row of the validation split has a label that the model knows ({known})")
    return logits[labels != IGNORE], labels[labels != IGNORE]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The one of least nll, which is convex in the temperature's inverse, so that halving finds its minimum."""
    low, high = 1 / HOTTEST, 1 / COLDEST
    right = logits.gather(1, labels[:, None])[:, 0]
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((middle * logits).softmax(1) * logits).sum(1)
        low, high = (low, middle) if float((expected - right).mean()) > 0 else (middle, high)
    return 2 / (low + high)


def fits(temperature: float) -> bool:
    """Whether it is the best of all, and not only as far as the bounds let it go."""
    return 1.01 * COLDEST < temperature < 0.99 * HOTTEST


def _quality(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """nll, and expected calibration error: how far confidence and accuracy are apart, in bins of confidence."""
    probabilities = logits.softmax(1)
    nll = -probabilities.gather(1, labels[:, None]).clamp(min=1e-300).log().mean()
    confidence, predicted = probabilities.max(1)
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, bins, confidence - (predicted == labels).double())
    return float(nll), float(gaps.abs().sum() / len(labels))
