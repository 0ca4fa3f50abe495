"""Scheduled sampling: which tokens a training pass reads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.models import SequenceGenerator
from tests.seqmodels.builders import make_language_model, make_translator

BOS, EOS, STEPS, ROWS = 2, 3, 12, 40


def reading(model: SequenceGenerator, labels: Tensor, lengths: Tensor, **batch: Any) -> Tensor:
    """The tokens that the decoder reads last, in the pass that is learned from."""
    seen: list[Tensor] = []
    hook = model.decoder.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(labels=labels, label_lengths=lengths, **batch).loss.backward()
    hook.remove()
    return seen[-1]


def batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(4, vocab_size, (ROWS, STEPS + 1), generator=draw)
    labels[:, 0] = BOS
    lengths = torch.randint(4, STEPS + 2, (ROWS,), generator=draw)
    return labels.masked_fill(torch.arange(STEPS + 1) >= lengths[:, None], 0), lengths


def make(rate: float, share_done: float) -> SequenceGenerator:
    """So decided that what it samples is what it finds likeliest."""
    model = make_language_model(vocab_size=30, scale=1.0, scheduled_sampling=rate, seed=2)
    with torch.no_grad():
        assert model.decoder.output_weight is not None
        model.decoder.output_weight.mul_(1e4)
    model.share_done = share_done
    return model.train()


def test_at_first_it_reads_what_it_is_given_and_draws_nothing() -> None:
    labels, lengths = batch(30)
    model, before = make(0.9, share_done=0.0), torch.get_rng_state()
    assert torch.equal(reading(model, labels, lengths), labels[:, :-1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(reading(make(0.9, share_done=1.0).eval(), labels, lengths), labels[:, :-1])


def test_at_last_it_reads_what_it_would_have_written() -> None:
    labels, lengths = batch(30)
    model = make(0.999999, share_done=1.0)
    read = reading(model, labels, lengths)
    likeliest = model.eval().predict(labels).argmax(-1)  # of each target, given the true tokens before it
    real = torch.arange(1, STEPS + 1) < lengths[:, None]
    expected = torch.cat([labels[:, :1], torch.where(real, likeliest, labels[:, 1:])[:, :-1]], 1)
    assert torch.equal(read, expected)
    assert not torch.equal(read, labels[:, :-1])


@pytest.mark.parametrize(("rate", "share_done"), [(0.5, 1.0), (0.8, 0.25)])
def test_the_share_rises_with_the_training(rate: float, share_done: float) -> None:
    torch.manual_seed(0)
    labels, lengths = batch(30)
    model = make(rate, share_done)
    real = torch.arange(STEPS) < lengths[:, None] - 1
    real[:, 0] = False  # the first token is always the given one
    differs = model.eval().predict(labels).argmax(-1)[:, :-1] != labels[:, 1:-1]
    model.train()
    hits, count = 0, 0
    for _ in range(30):
        read = reading(model, labels, lengths)
        could = real[:, 1:] & differs
        hits, count = hits + int((read[:, 1:] != labels[:, 1:-1])[could].sum()), count + int(could.sum())
    assert hits / count == pytest.approx(rate * share_done, abs=0.03)


def test_a_translator_reads_its_source_once_and_learns_from_the_true_targets() -> None:
    fields = make_translator(seed=1, vocab_size=30)
    model = SequenceGenerator(
        fields.config.model_copy(
            update={"decoder": fields.config.decoder.model_copy(update={"scheduled_sampling": 0.5})}  # type: ignore[union-attr]
        )
    )
    model.share_done = 1.0
    labels, lengths = batch(30)
    calls: list[int] = []
    assert model.encoder is not None
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randint(4, 30, (ROWS, 5))
    out = model.train()(labels=labels, label_lengths=lengths, inputs=inputs, lengths=torch.full((ROWS,), 5))
    assert len(calls) == 1
    assert out.num_targets == (lengths - 1).sum()
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
