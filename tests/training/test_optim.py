"""One update: clipping by hand, non-finite losses, micro-batches against one large batch, schedules, optimizers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqmodels.errors import ConfigError
from seqmodels.losses import Output
from seqmodels.models import build_model
from seqmodels.state import State
from tests.seqmodels.builders import make_model
from tests.training.recipes import LANGUAGE_MODEL, WORDS, recipe
from training.config import OptimSection
from training.data.batches import Batch, Buckets
from training.data.examples import Codec
from training.data.generated import generate
from training.data.streams import Streams
from training.optim import (
    FULL,
    Precision,
    add_noise,
    build_optimizer,
    check_schedule,
    cycles_done,
    freeze,
    gradient_norm,
    learning_rate,
    still_statistics,
    unscale_and_clip,
    update,
)

FREE = OptimSection(optimizer="sgd", learning_rate=0.5, max_grad_norm=None)


class Slope(nn.Module):
    """loss = weight · inputs, so the gradient is the mean input; its buffer moves in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, labels: Tensor) -> Output:
        self.seen += 1
        loss = (labels * self.weight).sum(1).mean()
        return Output(loss, loss.detach(), torch.tensor(len(labels)))


def slope_batch(*rows: tuple[float, float]) -> Batch:
    return {"labels": torch.tensor(rows)}


def run(model: nn.Module, *batches: Batch, section: OptimSection = FREE) -> Any:
    return update(model, batches, build_optimizer(section, model), section, section.learning_rate, measure_ratio=True)


def test_clipping_by_norm_by_hand() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert float(gradient_norm(gradients)) == 5.0
    assert unscale_and_clip(gradients, 1.0, 5.0, max_norm=1.0, max_value=None)
    assert torch.allclose(gradients[0], torch.tensor([0.6, 0.0])) and torch.allclose(gradients[1], torch.tensor(0.8))
    assert not unscale_and_clip(gradients, 1.0, 1.0, max_norm=1.0, max_value=None)  # not above the bound: left alone


def test_clipping_by_value_by_hand() -> None:
    gradients = [torch.tensor([3.0, -0.5, -9.0])]
    assert unscale_and_clip(gradients, 1.0, 9.5, max_norm=None, max_value=1.0)
    assert gradients[0].tolist() == [1.0, -0.5, -1.0]
    assert not unscale_and_clip(gradients, 1.0, 1.5, max_norm=None, max_value=1.0)


def test_norm_first_then_value() -> None:
    gradients = [torch.tensor([6.0, 8.0])]
    unscale_and_clip(gradients, 1.0, 10.0, max_norm=5.0, max_value=3.5)  # to (3, 4), then to (3, 3.5)
    assert gradients[0].tolist() == [3.0, 3.5]


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    gradients = [torch.tensor([12.0, 16.0])]
    assert unscale_and_clip(gradients, 0.5, 10.0, max_norm=5.0, max_value=None)  # to (6, 8), of length 10, to (3, 4)
    assert gradients[0].tolist() == [3.0, 4.0]


def test_the_update_itself_is_bounded() -> None:
    model, section = Slope(), FREE.model_copy(update={"max_grad_norm": 1.0})
    done = run(model, slope_batch((30.0, 40.0)), section=section)
    assert done.norm == 50.0 and done.clipped
    assert torch.allclose(model.weight, torch.tensor([1 - 0.5 * 0.6, 2 - 0.5 * 0.8]))
    assert done.ratio == pytest.approx(0.5 / math.sqrt(5))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_planted_infinite_loss_leaves_everything_untouched(bad: float) -> None:
    model = Slope()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = run(model, slope_batch((1.0, 1.0)), slope_batch((bad, 1.0)))
    assert done.skipped and done.num_targets == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_micro_batches_of_unequal_size_are_one_large_batch() -> None:
    whole, parts = Slope(), Slope()
    one = run(whole, slope_batch((1, 2), (3, 5), (4, 1)))
    two = run(parts, slope_batch((1, 2)), slope_batch((3, 5), (4, 1)))
    assert torch.allclose(whole.weight, parts.weight)
    assert (one.loss, one.num_targets, one.norm) == pytest.approx((two.loss, two.num_targets, two.norm))


def test_micro_batches_are_one_large_batch_in_a_real_model() -> None:
    made, rows = recipe(), generate("sentiment")["train"][:60]
    codec = Codec.train(made, rows)
    examples = codec.encode(rows)
    weights = []
    for rows_per_batch in (60, 7):
        torch.manual_seed(3)
        model = build_model(codec.config)
        buckets = Buckets(examples, codec, 100_000, rows_per_batch, seed=1)
        run(model, *(buckets.batch(0, index) for index in range(len(buckets))))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_running_text_goes_on_where_the_micro_batch_before_it_ended() -> None:
    """Both within an update and from one to the next: the loss is that of the model, read chunk by chunk by hand."""
    rows = generate("language-model")["train"][:20]
    data = {"generated": "language-model", "tokenizer": WORDS}
    codec = Codec.train(recipe("generate", data=data, model=LANGUAGE_MODEL), rows)
    model, streams = build_model(codec.config).eval(), Streams(codec.encode(rows), 2, 5)
    states: list[State | None] = [None]
    losses = []
    for index in range(3):
        out = model(**streams.batch(0, index), state=states[-1])
        states.append(State(out.state.values.detach()))
        losses.append(float(out.loss) * int(out.num_targets))
    still = FREE.model_copy(update={"learning_rate": 0.0})
    chunks: list[Batch] = [{**streams.batch(0, index), "state": None} for index in range(3)]
    first = run(model, *chunks[:2], section=still)
    assert first.loss == pytest.approx(sum(losses[:2])) and torch.allclose(first.state.values, states[2].values)
    second = update(model, chunks[2:], build_optimizer(still, model), still, 0.0, carried=first.state)
    assert second.loss == pytest.approx(losses[2])
    assert second.loss != pytest.approx(run(model, chunks[2], section=still).loss), "a lost state would show"


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"optimizer": "adam"}, torch.optim.Adam),
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
        ({"optimizer": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"optimizer": "rmsprop", "momentum": 0.5}, torch.optim.RMSprop),
        ({"optimizer": "adagrad"}, torch.optim.Adagrad),
    ],
)
def test_optimizers_are_torchs_with_the_recipes_settings(settings: dict[str, Any], kind: type) -> None:
    model = Slope()
    optimizer = build_optimizer(OptimSection(**settings), model)
    assert type(optimizer) is kind
    for name in ("momentum", "nesterov", "weight_decay"):
        if name in settings:
            assert optimizer.param_groups[0][name] == settings[name]
    before = model.weight.detach().clone()
    update(model, [slope_batch((1.0, 1.0))], optimizer, OptimSection(**settings), 0.01)
    assert bool((model.weight < before).all())


def test_schedules_by_hand() -> None:
    def rates(steps: list[int], **settings: Any) -> list[float]:
        section = OptimSection(learning_rate=1.0, **settings)
        return [learning_rate(section, step, total_steps=14) for step in steps]

    assert rates([0, 1, 3, 4, 9], warmup_steps=4) == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = rates([0, 3, 4, 9, 14], warmup_steps=4, lr_scheduler_type="cosine")
    assert cosine == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    # two cycles of 5 steps after the warm-up: each begins at the full rate and nears 0
    cycles = rates([3, 4, 6, 8, 9, 11, 13, 14], warmup_steps=4, lr_scheduler_type="cosine_with_restarts", num_cycles=2)
    falls = [0.5 * (1 + math.cos(math.pi * share)) for share in (0.0, 0.4, 0.8)]
    assert cycles == pytest.approx([1.0, *falls, *falls, 0.0])
    inverse = rates([0, 3, 15], warmup_steps=4, lr_scheduler_type="inverse_sqrt")
    assert inverse == pytest.approx([0.25, 1.0, 0.5])
    plateau = OptimSection(learning_rate=1.0, lr_scheduler_type="plateau")
    assert learning_rate(plateau, 5, 10, plateau_scale=0.25) == 0.25


def test_cycles_end_where_the_rate_starts_again() -> None:
    section = OptimSection(warmup_steps=4, lr_scheduler_type="cosine_with_restarts", num_cycles=3)
    assert [cycles_done(section, step, total_steps=10) for step in (0, 4, 5, 6, 7, 8, 9, 10)] == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
    ]


def test_cycles_of_less_than_two_steps_are_refused() -> None:
    section = OptimSection(warmup_steps=4, lr_scheduler_type="cosine_with_restarts", num_cycles=3)
    check_schedule(section, total_steps=10)
    with pytest.raises(ConfigError, match="num_cycles is 3, but a run of 9 steps has 5 after"):
        check_schedule(section, total_steps=9)


def test_noise_is_of_the_papers_size_and_comes_after_clipping() -> None:
    torch.manual_seed(0)
    gradients = [torch.ones(200_000)]
    add_noise(gradients, eta=0.3, step=99)
    noise = gradients[0] - 1
    assert float(noise.mean()) == pytest.approx(0, abs=2e-3)
    assert float(noise.var()) == pytest.approx(0.3 / 100**0.55, rel=0.02)
    section = FREE.model_copy(update={"gradient_noise": 1.0, "max_grad_norm": 1e-6})
    model = Slope()
    done = run(model, slope_batch((30.0, 40.0)), section=section)
    assert done.norm == 50.0 and (done.ratio or 0) > 0.05  # what was clipped to nothing is not what moved the weights


def test_a_scaled_loss_changes_no_bit() -> None:
    """Where nothing overflows: a power of 2 is multiplied and divided exactly."""
    plain, scaled = Slope(), Slope()
    for model, precision in ((plain, FULL), (scaled, Precision(None, 2.0**12))):
        optimizer = build_optimizer(FREE, model)
        update(model, [slope_batch((0.3, 0.7), (1.7, -0.2))], optimizer, FREE, 0.1, precision=precision)
    assert torch.equal(plain.weight, scaled.weight)


def test_a_scale_that_overflows_is_skipped() -> None:
    model = Slope()
    before = model.weight.detach().clone()
    done = update(
        model, [slope_batch((1.0, 1.0))], build_optimizer(FREE, model), FREE, 0.1, precision=Precision(None, 2.0**130)
    )
    assert done.skipped and torch.equal(model.weight, before)


def test_bfloat16_trains_as_float32_does_but_for_its_digits() -> None:
    made, rows = recipe(), generate("sentiment")["train"][:60]
    codec = Codec.train(made, rows)
    buckets = Buckets(codec.encode(rows), codec, 100_000, 60, seed=1)
    weights, losses = [], []
    for precision in (FULL, Precision(torch.bfloat16)):
        torch.manual_seed(3)
        model = build_model(codec.config)
        optimizer = build_optimizer(FREE, model)
        losses.append(update(model, [buckets.batch(0, 0)], optimizer, FREE, 0.5, precision=precision).loss)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert torch.allclose(weights[0], weights[1], atol=5e-3) and not torch.equal(weights[0], weights[1])


class Two(nn.Module):
    """Two slopes, whose gradients are the mean inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = Slope(), Slope()

    def forward(self, labels: Tensor) -> Output:
        low, high = self.low(labels), self.high(labels)
        return Output(low.loss + high.loss, low.nll + high.nll, low.num_targets)


def test_parameters_have_rates_of_their_own() -> None:
    section = FREE.model_copy(update={"learning_rate_factors": {"low.*": 0.1, "*.weight": 2.0}})
    model = Two()
    run(model, slope_batch((1.0, 3.0)), section=section)
    assert model.low.weight.tolist() == pytest.approx([1 - 0.05, 2 - 0.15])  # the first pattern counts
    assert model.high.weight.tolist() == pytest.approx([1 - 1.0, 2 - 3.0])
    wrong = FREE.model_copy(update={"learning_rate_factors": {"middle.*": 0.1}})
    with pytest.raises(ConfigError, match=r"learning_rate_factors holds 'middle\.\*'.*low\.weight"):
        build_optimizer(wrong, model)


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {}])
def test_what_is_unfrozen_later_moves_from_then_on(optimizer: dict[str, Any]) -> None:
    settings = {"optimizer": "adamw", "weight_decay": 0.1, "unfreeze_steps": {"low.*": 2}}
    section = OptimSection.model_validate(settings | optimizer)
    model = Two()
    optimizer = build_optimizer(section, model)
    moved = []
    for step in range(4):
        before = model.low.weight.detach().clone(), model.high.weight.detach().clone()
        update(model, [slope_batch((1.0, 3.0))], optimizer, section, 0.1, step=step)
        now = model.low.weight, model.high.weight
        moved.append(tuple(not torch.equal(one, two) for one, two in zip(before, now, strict=True)))
    assert moved == [(False, True), (False, True), (True, True), (True, True)]
    with pytest.raises(ConfigError, match="unfreeze_steps holds 'middle'"):
        build_optimizer(section.model_copy(update={"unfreeze_steps": {"middle": 3}}), model)


def test_frozen_parameters_stay_and_a_pattern_must_match() -> None:
    made, rows = recipe(), generate("sentiment")["train"][:60]
    codec = Codec.train(made, rows)
    model = build_model(codec.config)
    freeze(model, ["encoder.*"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, Buckets(codec.encode(rows), codec, 4096, 60, seed=1).batch(0, 0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="encodre"):
        freeze(model, ["encodre.*"])
    for field, value in (("unfreeze_steps", {"encoder.*": 3}), ("learning_rate_factors", {"encoder.*": 0.5})):
        section = OptimSection.model_validate({field: value})
        with pytest.raises(ConfigError, match=rf"{field} holds 'encoder\.\*', but optim\.freeze has frozen all"):
            build_optimizer(section, model)
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(model, ["*"])


def test_statistics_of_what_is_frozen_or_held_stand_still() -> None:
    backbone = {"channels": [4, 6], "blocks_per_stage": 1}
    fields = {"architecture": "tagger", "encoder": {"input": "frames", "backbone": backbone}, "labels": ["a", "b"]}
    model = make_model(**fields)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    first, second = ({name for name in norms if f"stages.{stage}" in name} for stage in (0, 1))
    assert first and second and len(norms) > len(first | second)
    freeze(model, ["*backbone.stages.0.*"])
    for step, still in ((0, first | second), (2, first)):
        model.train()
        still_statistics(model, {"*backbone.stages.1.*": 2}, step)
        assert {name for name, module in norms.items() if not module.training} == still


@pytest.mark.parametrize(("max_value", "weights"), [(None, [0.7, 1.6]), (0.7, [0.7, 1.65])])
def test_clipping_sees_the_mean_gradient_whatever_the_scale(max_value: float | None, weights: list[float]) -> None:
    """Mean (60, 80), norm 100, cut to (0.6, 0.8), then to 0.7 each; times the rate of 0.5."""
    model = Slope()
    section = FREE.model_copy(update={"max_grad_norm": 1.0, "clip_value": max_value})
    batch = slope_batch((30.0, 40.0), (90.0, 120.0))
    precision = Precision(None, 2.0**12)
    done = update(model, [batch], build_optimizer(section, model), section, 0.5, precision=precision)
    assert done.norm == pytest.approx(100) and done.clipped
    assert model.weight.tolist() == pytest.approx(weights)
