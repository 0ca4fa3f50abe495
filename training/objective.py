"""What a step of training calls for its loss: the model itself, or what the recipe puts around it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.losses import IGNORE, Output
from seqmodels.models import Model, SequenceGenerator
from training.config import Recipe
from training.data.examples import Codec
from training.data.rows import Row
from training.self_critical import REWARDS, CiderReward, SelfCritical


class RDrop:
    """A model called as one is, `out = model(**batch)`, each row twice: dropout draws two networks, and what they
    predict is to be alike (R-Drop; Liang et al. 2021, equation 4).

    The loss is half of the paper's, so that it is as large as the model's own: the mean of the two networks' losses,
    and alpha / 2 times the mean of the divergences from each to the other. nll is the mean of both.
    """

    def __init__(self, model: Model, alpha: float) -> None:
        self._model, self._alpha = model, alpha

    def __call__(self, **batch: Any) -> Output:
        """state: of running text, where the last chunk's two networks ended, so twice as many rows as the others."""
        twice = {name: torch.cat([value, value]) for name, value in batch.items() if isinstance(value, Tensor)}
        out: Output = self._model(**{**batch, **twice})
        assert out.logits is not None
        first, second = out.logits.float().log_softmax(-1).chunk(2)
        divergence = (_divergence(first, second) + _divergence(second, first)) / 2  # of each place
        if divergence.shape == batch["labels"].shape:  # of a tagger, or one of several labels
            divergence = divergence.masked_fill(batch["labels"] == IGNORE, 0.0)
        num_targets = out.num_targets // 2
        held = self._alpha / 2 * divergence.sum() / num_targets.clamp(min=1)
        return replace(out, loss=out.loss + held, num_targets=num_targets, logits=None)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback and Leibler's, in nats, from log-probabilities p (..., C) to q: (...)."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


Objective = Model | SelfCritical | RDrop


def objective_of(recipe: Recipe, codec: Codec, model: Model, rows: Sequence[Row]) -> Objective:
    """The recipe's. rows: to train on."""
    run = recipe.run
    if run.r_drop is not None:
        return RDrop(model, run.r_drop)
    if run.self_critical is None:
        return model
    assert isinstance(model, SequenceGenerator) and codec.target_tokenizer is not None, "others are refused"
    reward = CiderReward(rows) if run.self_critical == "cider_d" else REWARDS[run.self_critical]
    weight, max_new_tokens = run.self_critical_weight, recipe.generation.max_new_tokens
    return SelfCritical(model, codec.target_tokenizer, reward, weight, max_new_tokens)
