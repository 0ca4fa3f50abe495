"""Optimizers, schedules, and the one update that every step of training makes.

An update sums the gradients of its micro-batches, divides once by the number of targets, clips, and steps; if a loss
or a gradient is not finite, the weights stay untouched. Knows no task, no file and no log.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from seqmodels.errors import ConfigError, SeqModelsError
from seqmodels.losses import Output
from seqmodels.state import State
from training.config import OptimSection, some
from training.data.batches import Batch
from training.workers import ALONE, Workers


class DivergedError(SeqModelsError):
    """Loss or gradient was not finite for several steps in a row."""


@dataclass(frozen=True)
class Update:
    """What one update did. loss, nll: sums over targets. norm: of the gradient, before clipping."""

    loss: float
    nll: float
    num_targets: int
    num_tokens: int  # real positions read and written; the measure of speed
    norm: float
    clipped: bool
    skipped: bool  # loss or gradient was not finite; no weight changed
    ratio: float | None  # length of the weights' change over length of the weights, where it was asked for
    state: State | None  # where the last micro-batch ended; None of one that was skipped, whose states are not finite


@dataclass(frozen=True)
class Precision:
    """In which numbers the forward pass and the gradients of activations are computed (Micikevicius et al. 2018).

    dtype: of 16 bits, None for float32 throughout. loss_scale: what the loss is multiplied by, so that float16's small
    gradients do not become 0; a power of 2, so that dividing again is exact.
    """

    dtype: torch.dtype | None = None
    loss_scale: float = 1.0

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


FULL = Precision()


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose names match a pattern. Raises ConfigError where none does."""
    for pattern in patterns:
        for _, parameter in matching(model, pattern, "optim.freeze"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("optim.freeze leaves nothing to train; remove a pattern")


def matching(model: nn.Module, pattern: str, field: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names match. Raises ConfigError, which names the recipe's field, where none does."""
    found = [(name, value) for name, value in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        names = some([name for name, _ in model.named_parameters()])
        raise ConfigError(f"{field} holds {pattern!r}, which matches no parameter; there are {names}")
    return found


def build_optimizer(section: OptimSection, model: nn.Module) -> Optimizer:
    """The recipe's optimizer, of all parameters that are not frozen. Raises ConfigError for a pattern of no match."""
    groups = _groups(section, model)
    rate, decay, momentum = section.learning_rate, section.weight_decay, section.momentum
    fused = not (momentum and section.unfreeze_steps)  # torch's kernel wants a momentum of all parameters or of none
    match section.optimizer:
        case "adam":
            return Adam(groups, rate, weight_decay=decay, fused=True)
        case "adamw":
            return AdamW(groups, rate, weight_decay=decay, fused=True)
        case "sgd":
            return SGD(groups, rate, momentum=momentum, nesterov=section.nesterov, weight_decay=decay, fused=fused)
        case "rmsprop":
            return RMSprop(groups, rate, momentum=momentum, weight_decay=decay)
        case "adagrad":
            return Adagrad(groups, rate, weight_decay=decay, fused=True)


def _groups(section: OptimSection, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by what their learning rate is multiplied by, each group with its `factor`."""
    factors = dict.fromkeys(model.parameters(), 1.0)
    for pattern, factor in reversed(section.learning_rate_factors.items()):  # so that the first match counts
        factors |= dict.fromkeys(_learning(model, pattern, "optim.learning_rate_factors"), factor)
    for pattern in section.unfreeze_steps:
        _learning(model, pattern, "optim.unfreeze_steps")
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, factor in factors.items():
        if parameter.requires_grad:
            groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def _learning(model: nn.Module, pattern: str, field: str) -> list[nn.Parameter]:
    """The parameters whose names match. Raises ConfigError where none does, or all that do are frozen."""
    found = [parameter for _, parameter in matching(model, pattern, field)]
    if not any(parameter.requires_grad for parameter in found):
        raise ConfigError(
            f"{field} holds {pattern!r}, but optim.freeze has frozen all that it names; remove one of them"
        )
    return found


def hold(model: nn.Module, unfreeze_steps: Mapping[str, int], step: int) -> None:
    """Drop the gradients of parameters whose turn has not come: the optimizer then leaves them alone."""
    for parameter in _held(model, unfreeze_steps, step):
        parameter.grad = None


def _held(model: nn.Module, unfreeze_steps: Mapping[str, int], step: int) -> set[nn.Parameter]:
    waiting = [pattern for pattern, first in unfreeze_steps.items() if step < first]
    return {parameter for pattern in waiting for _, parameter in matching(model, pattern, "optim.unfreeze_steps")}


def still_statistics(model: nn.Module, unfreeze_steps: Mapping[str, int], step: int) -> None:
    """Put batch normalisation that does not learn, frozen or held, into evaluation mode: its running statistics would
    move all the same, and with them all that follows it."""
    held = _held(model, unfreeze_steps, step)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(any(value.requires_grad and value not in held for value in module.parameters()))


def learning_rate(section: OptimSection, step: int, total_steps: int, plateau_scale: float = 1.0) -> float:
    """The rate of one step, counted from 0: a pure function, so nothing of a schedule needs saving.

    plateau_scale: what the plateaus so far have multiplied the rate by.
    """
    warm_up, done = section.warmup_steps, step + 1
    if done <= warm_up:
        return section.learning_rate * done / warm_up
    match section.lr_scheduler_type:
        case "cosine":  # from the end of warm-up down to 0
            share = (step - warm_up) / max(1, total_steps - warm_up)
            return section.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        case "cosine_with_restarts":  # Loshchilov and Hutter 2017, with cycles of one length
            share, cycle = math.modf((step - warm_up) * section.num_cycles / max(1, total_steps - warm_up))
            return section.learning_rate * 0.5 * (1 + math.cos(math.pi * share)) if cycle < section.num_cycles else 0.0
        case "inverse_sqrt":  # Vaswani et al. 2017
            return section.learning_rate * math.sqrt(warm_up / done)
        case "plateau":
            return section.learning_rate * plateau_scale
        case "constant":
            return section.learning_rate


def check_schedule(section: OptimSection, total_steps: int) -> None:
    """Raises ConfigError for cycles that are too short to fall in."""
    steps = total_steps - section.warmup_steps
    if section.num_cycles > 1 and steps < 2 * section.num_cycles:
        raise ConfigError(
            f"optim.num_cycles is {section.num_cycles}, but a run of {total_steps} steps has {max(0, steps)} after its "
            "warm-up; give each cycle two at least"
        )


def too_late(section: OptimSection, total_steps: int) -> list[str]:
    """What will not come about within so many steps, such as in a recipe's short trial; a line for each."""
    never = [pattern for pattern, step in section.unfreeze_steps.items() if step >= total_steps]
    lines = (
        [f"optim.unfreeze_steps leaves {some(never)} frozen for all {total_steps} steps of this run"] if never else []
    )
    if section.warmup_steps > total_steps:
        lines.append(
            f"optim.warmup_steps is {section.warmup_steps}, but this run has {total_steps} steps: its rate never comes "
            f"to {section.learning_rate}"
        )
    return lines


def cycles_done(section: OptimSection, step: int, total_steps: int) -> int:
    """How many cycles of the rate have ended after so many steps; see `learning_rate`."""
    done = (step - section.warmup_steps) * section.num_cycles / max(1, total_steps - section.warmup_steps)
    return max(0, math.floor(done))


def update(
    model: nn.Module,
    micro_batches: Iterable[Batch],
    optimizer: Optimizer,
    section: OptimSection,
    rate: float,
    carried: State | None = None,
    measure_ratio: bool = False,
    step: int = 0,
    precision: Precision = FULL,
    workers: Workers = ALONE,
    objective: Callable[..., Output] | None = None,
) -> Update:
    """One update of the weights. objective: what is called with each batch, where that is not the model itself.

    carried: where the last batch of running text ended; micro-batches that have a `state` key go on from it. step:
    counted from 0, for the noise. workers: those who make the same update, each from micro-batches of its own. The
    order is: add up over workers, skip what is not finite, unscale and clip, add noise, step. Where the gradients are
    done, a GPU is waited for once, for all the sums together; what the forward pass waits for is the model's affair.
    """
    optimizer.zero_grad(set_to_none=True)
    buffers = [buffer.clone() for buffer in model.buffers()]  # running statistics move in the forward pass already
    sums = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)  # loss, nll, targets
    num_tokens = 0
    for batch in micro_batches:
        num_tokens += _num_tokens(batch)
        batch = _moved(batch, sums.device)
        if "state" in batch:
            batch["state"] = carried
        with precision.autocast(sums.device):
            out = (objective or model)(**batch)
        total = out.loss * out.num_targets
        (total * precision.loss_scale).backward()
        sums += torch.stack([total.detach(), out.nll.detach() * out.num_targets, out.num_targets.to(sums.dtype)])
        carried = out.state.detach().float() if out.state is not None else None
    hold(model, section.unfreeze_steps, step)
    workers.add_gradients(_parameters(optimizer))
    gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
    *mine, norm = torch.cat([sums, gradient_norm(gradients).to(sums)[None]]).tolist()
    loss_sum, nll_sum, *counts = workers.total(*mine, num_tokens)
    num_targets, num_tokens = map(int, counts)
    mean = 1 / (max(1, num_targets) * precision.loss_scale)
    norm *= mean
    if not (math.isfinite(loss_sum) and math.isfinite(norm)):
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return Update(0.0, 0.0, 0, num_tokens, norm, clipped=False, skipped=True, ratio=None, state=None)
    clipped = unscale_and_clip(gradients, mean, norm, section.max_grad_norm, section.clip_value)
    if section.gradient_noise:
        add_noise(gradients, section.gradient_noise, step)
        workers.copy_first(gradients)  # the same noise for all
    ratio = _step(optimizer, rate, measure_ratio)
    return Update(loss_sum, nll_sum, num_targets, num_tokens, norm, clipped, skipped=False, ratio=ratio, state=carried)


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean length of all gradients together, in float32."""
    return torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients])


def unscale_and_clip(
    gradients: list[Tensor], scale: float, norm: float, max_norm: float | None, max_value: float | None
) -> bool:
    """Multiply all gradients, in place, by `scale`; bring their common norm, which is `norm` then, down to `max_norm`
    (Pascanu et al. 2013); bound each number by `max_value`. Returns whether anything was cut.
    """
    clipped = False
    if max_norm is not None and norm > max_norm:
        clipped, scale = True, scale * max_norm / norm
    if scale != 1 and gradients:
        torch._foreach_mul_(gradients, scale)
    if max_value is not None and gradients:
        clipped = bool(torch.stack([gradient.abs().max() for gradient in gradients]).max() > max_value) or clipped
        torch._foreach_clamp_min_(gradients, -max_value)
        torch._foreach_clamp_max_(gradients, max_value)
    return clipped


def add_noise(gradients: Iterable[Tensor], eta: float, step: int) -> None:
    """Normal noise, less and less of it: variance eta / (1 + step) ** 0.55 (Neelakantan et al. 2015)."""
    deviation = math.sqrt(eta / (1 + step) ** 0.55)
    for gradient in gradients:
        gradient.add_(torch.randn_like(gradient), alpha=deviation)


def _num_tokens(batch: Batch) -> int:
    lengths = [int(batch[name].sum()) for name in ("lengths", "label_lengths") if name in batch]
    return sum(lengths) or len(batch["labels"])


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _step(optimizer: Optimizer, rate: float, measure_ratio: bool) -> float | None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    if not measure_ratio:
        optimizer.step()
        return None
    parameters = _parameters(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    change = gradient_norm([now.detach() - then for now, then in zip(parameters, before, strict=True)])
    return float(change / gradient_norm(before).clamp(min=1e-12))
