"""The equations against the papers', written once more in plain NumPy, one number at a time where that is clearer."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seqmodels.cells import (
    NUM_GATES,
    SHARES,
    UPDATES,
    CellWeights,
    MinimalWeights,
    gru_step,
    lstm_step,
    minimal_step,
    rnn_step,
    zoneout,
)
from seqmodels.config import Cell

H, D, B = 5, 3, 4
Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def normalised(x: Array, gain: Array, bias: Array | float = 0.0) -> Array:
    """Ba et al. 2016, equation 4, row by row."""
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in row) / len(row) + 1e-5)
        rows.append(gain * (row - mean) / deviation + bias)
    return np.stack(rows)


def numbers(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.double)


def make_weights(gates: int, together: bool = False, cell: bool = False) -> CellWeights:
    size = gates * H
    gains = (numbers(size), None if together else numbers(size))
    return CellWeights(
        numbers(size, D), numbers(size, H), numbers(size), numbers(size), *gains,
        *((numbers(H), numbers(H)) if cell else ()),
    )  # fmt: skip


def arrays(weights: CellWeights) -> list[Array]:
    return [np.zeros(0) if part is None else part.numpy() for part in vars(weights).values()]


@pytest.mark.parametrize("relu", [False, True])
def test_a_normalised_rnn(relu: bool) -> None:
    weights, x, hidden = make_weights(1, together=True), numbers(B, D), numbers(B, H)
    w, u, b, c, gain, *_ = arrays(weights)
    total = normalised(x.numpy() @ w.T + hidden.numpy() @ u.T, gain, b + c)
    expected = np.maximum(total, 0) if relu else np.tanh(total)
    assert np.allclose(rnn_step(x, hidden, weights, relu).hidden.numpy(), expected, atol=1e-12)


def test_a_normalised_lstm() -> None:
    """Equations 20 to 22 of the supplement, whose three biases inside the sum are one."""
    weights, x, hidden, cell = make_weights(4, cell=True), numbers(B, D), numbers(B, H), numbers(B, H)
    w, u, b, c, gain_x, gain_h, gain_c, bias_c = arrays(weights)
    total = normalised(x.numpy() @ w.T, gain_x) + normalised(hidden.numpy() @ u.T, gain_h) + b + c
    i, f, g, o = (total[:, k * H : (k + 1) * H] for k in range(4))
    new_cell = sigmoid(f) * cell.numpy() + sigmoid(i) * np.tanh(g)
    step = lstm_step(x, hidden, cell, weights)
    assert step.cell is not None and np.allclose(step.cell.numpy(), new_cell, atol=1e-12)
    assert np.allclose(step.hidden.numpy(), sigmoid(o) * np.tanh(normalised(new_cell, gain_c, bias_c)), atol=1e-12)


def test_a_normalised_gru() -> None:
    """r and z are normalised as one vector, the candidate as another."""
    weights, x, hidden = make_weights(3), numbers(B, D), numbers(B, H)
    w, u, b, c, gain_x, gain_h, *_ = arrays(weights)
    both = 2 * H
    from_x, from_h = x.numpy() @ w.T, hidden.numpy() @ u.T
    gates = normalised(from_x[:, :both], gain_x[:both], b[:both]) + normalised(
        from_h[:, :both], gain_h[:both], c[:both]
    )
    r, z = sigmoid(gates[:, :H]), sigmoid(gates[:, H:])
    xn = normalised(from_x[:, both:], gain_x[both:], b[both:])
    n = np.tanh(xn + r * normalised(from_h[:, both:], gain_h[both:], c[both:]))
    assert np.allclose(gru_step(x, hidden, weights).hidden.numpy(), (1 - z) * n + z * hidden.numpy(), atol=1e-12)


def test_a_normalised_cell_does_not_see_the_scale_of_what_it_reads() -> None:
    """Ba et al. 2016, table 1: what layer normalisation is for."""
    weights, x, hidden, cell = make_weights(4, cell=True), 100 * numbers(B, D), numbers(B, H), numbers(B, H)
    one, two = lstm_step(x, hidden, cell, weights), lstm_step(1000 * x, hidden, cell, weights)
    assert torch.allclose(one.hidden, two.hidden, atol=1e-6)


def test_a_min_gru() -> None:
    """Feng et al. 2024, section 3.1."""
    weights, x, hidden = MinimalWeights(numbers(2 * H, D), numbers(2 * H)), numbers(B, D), numbers(B, H)
    total = x.numpy() @ weights.input.numpy().T + weights.bias.numpy()
    z, candidate = sigmoid(total[:, :H]), total[:, H:]
    step = minimal_step(x, hidden, weights, "min_gru")
    assert np.allclose(step.hidden.numpy(), (1 - z) * hidden.numpy() + z * candidate, atol=1e-12)


def test_a_min_lstm() -> None:
    """Feng et al. 2024, section 3.2: f' = f / (f + i), i' = i / (f + i)."""
    weights, x, hidden = MinimalWeights(numbers(3 * H, D), numbers(3 * H)), numbers(B, D), numbers(B, H)
    total = x.numpy() @ weights.input.numpy().T + weights.bias.numpy()
    f, i, candidate = sigmoid(total[:, :H]), sigmoid(total[:, H : 2 * H]), total[:, 2 * H :]
    step = minimal_step(x, hidden, weights, "min_lstm")
    assert np.allclose(step.hidden.numpy(), f / (f + i) * hidden.numpy() + i / (f + i) * candidate, atol=1e-12)


@pytest.mark.parametrize(("f", "i", "kept"), [
    (0.0, 0.0, 0.5), (-200.0, -200.0, 0.5), (200.0, 200.0, 0.5), (-200.0, 200.0, 0.0), (200.0, -200.0, 1.0),
    (-200.0, -201.0, 1 / (1 + math.exp(-1))),
])  # fmt: skip
def test_shares_of_a_min_lstm_are_finite_where_both_gates_are_0(f: float, i: float, kept: float) -> None:
    """In float32, in which exp(-200) and 1 + exp(200) are nothing and everything; with gradients."""
    bias = torch.tensor([f, i, 1.0], requires_grad=True)
    step = minimal_step(torch.zeros(1, 1), torch.zeros(1, 1), MinimalWeights(torch.zeros(3, 1), bias), "min_lstm")
    assert step.gates["keep"].item() == pytest.approx(kept, abs=1e-6)
    (gradient,) = torch.autograd.grad(step.gates["keep"].sum(), bias)
    slope = kept * (1 - kept)  # of f' by log f and by - log i, which are f and i where those are far below 0
    expected = [slope * (1 - 1 / (1 + math.exp(-f))), -slope * (1 - 1 / (1 + math.exp(-i))), 0.0]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


def test_zoneout_keeps_or_mixes() -> None:
    old, new, kept = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([True, False])
    assert zoneout(old, new, 0.25, kept).tolist() == [1.0, 20.0]
    assert zoneout(old, new, 0.25, None).tolist() == [7.75, 15.5]
    assert zoneout(old, new, 0.0, None) is new


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("cell", [*UPDATES, *SHARES])
def test_a_rows_bits_do_not_depend_on_where_it_stands(cell: Cell, rows: int) -> None:
    """Of what stands beside the products. Torch's sigmoid would fail this."""
    gates, size = NUM_GATES[cell], 7
    from_input, from_hidden = 3 * torch.randn(64, gates * size), torch.randn(64, gates * size)
    parts, biases = (torch.randn(64, size), torch.randn(64, size)), [torch.randn(gates * size) for _ in range(2)]
    matrix = torch.zeros(0)  # nobody looks at it here
    gains = [torch.randn(gates * size), None if cell.startswith("rnn") else torch.randn(gates * size)]
    weights = CellWeights(matrix, matrix, *biases, *gains, torch.randn(size), torch.randn(size))

    def computed(at: slice) -> tuple[Tensor, ...]:
        if cell in SHARES:
            return SHARES[cell](from_input[at], MinimalWeights(matrix, biases[0]))
        return UPDATES[cell](from_input[at], from_hidden[at], [part[at] for part in parts], weights).parts

    whole = computed(slice(64))
    for first in range(0, 64 - rows + 1, 3):
        at = slice(first, first + rows)
        assert all(torch.equal(one, two[at]) for one, two in zip(computed(at), whole, strict=True))


def test_plain_cells_have_no_gains() -> None:
    weights = CellWeights(torch.randn(4, 1), torch.randn(4, 1), torch.randn(4), torch.randn(4))
    x = torch.randn(2, 1)
    i, f, g, o = (F.linear(x, weights.input, weights.input_bias + weights.recurrent_bias)).chunk(4, 1)
    step = lstm_step(x, torch.zeros(2, 1), torch.ones(2, 1), weights)
    assert torch.allclose(step.hidden, o.sigmoid() * (f.sigmoid() + i.sigmoid() * g.tanh()).tanh(), atol=1e-6)
