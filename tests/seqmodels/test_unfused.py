"""Layers without a fused kernel: what zoneout keeps, what is normalised, 16 bits, packed weights, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.cells import CellWeights, lstm_update
from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.kernels import packed
from seqmodels.models import SequenceGenerator
from seqmodels.recurrent import Recurrent
from seqmodels.state import State
from tests.seqmodels.builders import RECURRENCES, UNFUSED, make_language_model
from tests.seqmodels.test_recurrent import make

SIZE = 32
RATES = {"zoneout": 0.2, "cell_zoneout": 0.5}


def one_step(cell: str, rows: int = 400, **rates: float) -> tuple[Recurrent, Tensor, State]:
    """A model, and one step's input and state that are alike in all rows."""
    model = Recurrent(cell, 3, SIZE, **rates)  # type: ignore[arg-type]
    x, state = torch.randn(1, 1, 3), torch.randn(1, model.state_width)
    return model, x.expand(rows, 1, 3), State(state.expand(rows, -1))


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm", "min_gru", "min_lstm"])
def test_zoneout_keeps_as_many_units_as_it_should_and_computes_the_others(cell: str) -> None:
    rates = RATES if cell == "lstm" else {"zoneout": 0.2}
    model, x, before = one_step(cell, **rates)
    plain = Recurrent(cell, 3, SIZE)  # type: ignore[arg-type]
    plain.load_state_dict(model.state_dict())  # whose parameters have the same names
    y, after = model(x, None, before)
    _, computed = plain(x, None, before)
    kept = after.values == before.values
    assert torch.allclose(after.values[~kept], computed.values[~kept], atol=1e-6)
    assert torch.equal(y[:, 0], after.values[:, :SIZE])
    for rate, part in zip(rates.values(), kept.split(SIZE, 1), strict=True):
        assert float(part.float().mean()) == pytest.approx(rate, abs=0.02)
        assert float(part.float().mean(0).std()) < 0.05 and not torch.equal(part[0], part[1])  # drawn for each unit
    if cell == "lstm":  # each part by draws of its own
        hidden, inner = kept.float().split(SIZE, 1)
        assert float((hidden * inner).mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("cell", ["gru", "lstm", "min_gru", "min_lstm"])
def test_evaluation_takes_the_mean_of_training(cell: str) -> None:
    """Of one step, of which it is the mean exactly."""
    rates = RATES if cell == "lstm" else {"zoneout": 0.3}
    model, x, before = one_step(cell, 20_000, **rates)
    mean = model(x, None, before)[1].values.mean(0)
    evaluated = model.eval()(x, None, before)[1].values
    assert torch.allclose(evaluated[0], mean, atol=0.05)
    assert torch.allclose(evaluated, evaluated[:1].expand_as(evaluated), atol=1e-6)  # nothing is drawn


@pytest.mark.parametrize("kind", ["LSTM, zoneout", "min_gru, zoneout"])
def test_each_step_draws_anew_and_from_the_global_generator_alone(kind: str) -> None:
    model = make(kind, 3, SIZE).train()
    x, random = torch.randn(1, 1, 3).expand(50, 6, 3), torch.get_rng_state()
    first, second = model(x)[0], model(x)[0]
    kept = first[:, 1:] == first[:, :-1]
    rate = RECURRENCES[kind]["zoneout"]
    assert float(kept.float().mean()) == pytest.approx(rate, abs=0.03)
    assert float((kept[:, 1:] & kept[:, :-1]).float().mean()) == pytest.approx(rate**2, abs=0.02)
    torch.set_rng_state(random)
    assert torch.equal(model(x)[0], first) and not torch.equal(first, second)


def test_what_a_normalised_cell_reads_has_mean_0_and_variance_1() -> None:
    """Seen through ReLU, which gives the mean square of the positive half, and passes all where the bias is high."""
    model = Recurrent("rnn_relu", 40, 1000, layer_norm=True).eval()
    y, _ = model(7 + 50 * torch.randn(3, 1, 40))
    assert torch.allclose(y.square().mean(2), torch.full((3, 1), 0.5), atol=0.1)  # of a normal number above 0
    with torch.no_grad():
        model.forward_layers[0].get_parameter("bias_ih_l0").fill_(10.0)
        model.forward_layers[0].get_parameter("gain_ih_l0").fill_(2.0)
    y, _ = model(7 + 50 * torch.randn(3, 1, 40))
    assert torch.allclose(y.mean(2), torch.tensor(10.0), atol=1e-3)
    assert torch.allclose(y.std(2), torch.tensor(2.0), atol=1e-2)


@pytest.mark.parametrize("kind", ["normalised LSTM", "normalised GRU", "normalised RNN", "LSTM, zoneout"])
def test_weights_are_dropped_alike_at_all_steps(kind: str) -> None:
    model = Recurrent(**RECURRENCES[kind], input_size=5, hidden_size=SIZE, weight_dropout=0.4)
    twin = Recurrent(**RECURRENCES[kind], input_size=5, hidden_size=SIZE)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    y, _ = model(x := torch.randn(4, 7, 5))
    torch.manual_seed(0)
    torch.randn(4, 7, 5)
    matrix = twin.forward_layers[0].get_parameter("weight_hh_l0")
    matrix.data = F.dropout(matrix.data, 0.4)
    assert torch.equal(y, twin(x)[0])


@pytest.mark.parametrize("kind", UNFUSED)
def test_16_bit_products_and_float32_sums(kind: str) -> None:
    """Under autocast, on from a state of 16 bits."""
    model, x, start = make(kind, 12, SIZE, 2), torch.randn(8, 30, 12), torch.randn(8, 12)
    state = State(start[:, :1].expand(8, model.state_width).tanh())
    expected, _ = model(x, None, state)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = model(x, None, State(state.values.bfloat16()))
    assert y.dtype == after.values.dtype == torch.float32
    assert 0 < float((y - expected).detach().abs().mean()) < 0.02
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sums_of_16_bit_products_are_not_rounded_again() -> None:
    model = Recurrent("lstm", 64, SIZE, cell_zoneout=0.3).eval()
    x, state = torch.randn(4, 1, 64), torch.randn(4, 2 * SIZE)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y, after = model(x, None, State(state))
    (weights,) = model.weights()
    assert isinstance(weights, CellWeights)
    hidden, cell = state.split(SIZE, 1)
    products = (
        F.linear(a.bfloat16(), w.bfloat16()).float() for a, w in ((x[:, 0], weights.input), (hidden, weights.recurrent))
    )
    step = lstm_update(*products, cell, weights)
    assert step.cell is not None
    assert torch.allclose(y[:, 0], step.hidden, atol=1e-5)
    assert torch.allclose(after.values[:, SIZE:], 0.3 * cell + 0.7 * step.cell, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", UNFUSED)
def test_packed_weights_compute_the_same_and_no_row_sees_another(kind: str, bidirectional: bool) -> None:
    """From 4 rows on, to the last bit, at sizes where plain products are not."""
    model = make(kind, 256, 256, 2, bidirectional)
    twin, x, lengths = packed(model), torch.randn(16, 9, 256), torch.tensor([9, 3, 1, 7] * 4)
    y, state = twin(x, lengths)
    expected, expected_state = model(x, lengths)
    torch.testing.assert_close(y[:, :1], expected[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.values, expected_state.values, atol=1e-5, rtol=1e-4)
    for rows in ([0, 1, 2, 3], [5, 2, 9, 15, 4], [8, 8, 8, 1, 1, 12]):
        few, few_state = twin(x[rows], lengths[rows])
        for row, (place, length) in enumerate(zip(rows, lengths[rows].tolist(), strict=True)):
            assert torch.equal(few[row, :length], y[place, :length])
        assert torch.equal(few_state.values, state.values[rows])
    assert not any(layer._products for layer in model.forward_layers)  # the given one stays as it is


@pytest.mark.parametrize("kind", RECURRENCES)
def test_each_kind_learns_to_remember(kind: str) -> None:
    """The first of eight tokens is asked for at the end; the others are noise."""
    torch.manual_seed(0)
    model = make_language_model(0, vocab_size=12, hidden_size=32, scale=1.0, recurrent={**RECURRENCES[kind],
                                "hidden_size": 32, "num_layers": 2}).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(250):
        optimizer.zero_grad()
        loss_of_memory(model, 64).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(loss_of_memory(model.eval(), 500).detach()) < 0.3  # from 2.1 of a guess


def loss_of_memory(model: SequenceGenerator, rows: int) -> Tensor:
    labels = torch.randint(4, 12, (rows, 9))
    labels[:, -1] = labels[:, 0]
    outputs, *_ = model.decoder.read(labels[:, :-1], model.start(None, rows))
    logits = model.decoder.project(model.decoder.features(outputs[:, -1:], None))
    return F.cross_entropy(logits[:, 0], labels[:, -1])


def test_a_config_reaches_the_layers() -> None:
    fields = {"cell": "lstm", "layer_norm": True, "zoneout": 0.1, "cell_zoneout": 0.3}
    model = make_language_model(recurrent={**fields, "hidden_size": 8}).decoder.recurrent
    assert model.zoneouts == (0.1, 0.3)
    names = {"gain_ih_l0", "gain_hh_l0", "gain_cell_l0", "bias_cell_l0"}
    assert names < {name for name, _ in model.forward_layers[0].named_parameters()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell": "gru", "cell_zoneout": 0.1}, "cell_zoneout is 0.1, but gru has no state beside its hidden one"),
        ({"cell": "min_lstm", "cell_zoneout": 0.1}, "cell_zoneout is 0.1, but min_lstm has no state beside"),
        ({"cell": "min_gru", "weight_dropout": 0.5}, "weight_dropout is 0.5, but min_gru has no recurrent matrix"),
        ({"cell": "min_lstm", "layer_norm": True}, "layer_norm is True, but min_lstm has .* or use cell lstm"),
        ({"zoneout": 1.0}, "recurrent.zoneout: Input should be less than 1"),
    ],
)
def test_what_a_cell_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    decoder = {"vocab_size": 9, "recurrent": fields}
    with pytest.raises(ConfigError, match=f"decoder.recurrent.*{message}|{message}"):
        ModelConfig.parse({"architecture": "generator", "decoder": decoder})
