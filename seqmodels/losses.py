"""What training minimises, and what it is measured by: means over targets.

Whatever a model chooses among, it gives logits (..., C), one of which is right: C labels, C tokens, or, where an input
may have several labels, 2 for each of them. Numbers are compared with those that a regression should have given.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from seqmodels.state import State

IGNORE = -100  # a label that is not counted


@dataclass(frozen=True)
class Output:
    """loss: what is minimised, mean per target. nll: plain mean negative log-likelihood in nats: what metrics use.

    logits: (B, C) of a classifier, (B, C, 2) where several labels may be right, (B, S, C) of a tagger, the numbers
    (B, K) of a regression, (M, V) of a generator, for its M real targets, row by row.
    state: where the recurrence stands after the batch, for those that carry one.
    """

    loss: Tensor
    nll: Tensor
    num_targets: Tensor
    logits: Tensor | None = None
    state: State | None = None


def labelled(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Output:
    """Loss and nll of logits (..., C) against labels (...), positions with IGNORE left out.

    Label smoothing (Szegedy et al. 2016) mixes the target with the uniform distribution. weights (...): what each
    target's part of the loss is multiplied by; the mean is still over the number of targets.
    """
    logprobs, targets = logits.flatten(0, -2).float().log_softmax(-1), labels.flatten()
    counted = targets != IGNORE
    num_targets = counted.sum()
    denominator = num_targets.clamp(min=1)
    costs = each = F.nll_loss(logprobs, targets, ignore_index=IGNORE, reduction="none")
    if smoothing > 0:
        costs = (1 - smoothing) * each - smoothing * logprobs.mean(-1) * counted
    if weights is not None:
        costs = costs * weights.flatten()
    return Output(costs.sum() / denominator, (each.sum() / denominator).detach(), num_targets, logits)


def measured(numbers: Tensor, targets: Tensor, deviations: Tensor) -> Output:
    """Loss and nll of a regression's numbers (B, K) against targets (B, K).

    The loss is the mean square error in units of each target's standard deviation (K,) in the training split; the nll
    that of a normal distribution of such a width around each number.
    """
    loss = ((numbers - targets) / deviations).float().square().mean()
    nll = 0.5 * loss + 0.5 * math.log(2 * math.pi) + deviations.log().mean()
    return Output(loss, nll.detach(), loss.new_tensor(targets.numel()), numbers)
