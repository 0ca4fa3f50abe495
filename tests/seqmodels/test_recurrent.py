"""The fused recurrence against the equations in plain sight, and against itself cut in pieces."""

import pytest
import torch
from torch import Tensor

from seqmodels.cells import CellWeights, gru_step, lstm_step, rnn_step
from seqmodels.recurrent import Recurrent
from seqmodels.state import State

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")


def equations(model: Recurrent, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One row (T, in) through the step functions of cells.py: outputs (length, out) and the State's columns."""
    layers = list(zip(model.forward_layers, model.backward_layers or [None] * model.num_layers, strict=True))
    hiddens, cells = [], []
    y = x[:length]
    for index, pair in enumerate(layers):
        outputs = []
        for direction, layer in enumerate(pair):
            if layer is None:
                continue
            weights = CellWeights(layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)  # type: ignore[arg-type]
            hidden = cell = torch.zeros(1, model.hidden_size, dtype=x.dtype)
            steps = []
            for t in range(length) if direction == 0 else reversed(range(length)):
                if model.cell == "lstm":
                    step = lstm_step(y[t : t + 1], hidden, cell, weights)
                    assert step.cell is not None
                    cell = step.cell
                elif model.cell == "gru":
                    step = gru_step(y[t : t + 1], hidden, weights)
                else:
                    step = rnn_step(y[t : t + 1], hidden, weights, relu=model.cell == "rnn_relu")
                hidden = step.hidden
                steps.append(hidden)
            outputs.append(torch.cat(steps if direction == 0 else steps[::-1]))
        out = torch.cat(outputs, 1)
        y = out + y if model.residual and index > 0 else out
        hiddens.append(hidden)
        cells.append(cell)
    return y, torch.cat(hiddens + (cells if model.cell == "lstm" else []), 1)[0]


def make(cell: str, num_layers: int, bidirectional: bool, residual: bool = False) -> Recurrent:
    return Recurrent(cell, 5, 6, num_layers, bidirectional, residual).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_fused_equals_equations(cell: str, num_layers: int, bidirectional: bool, residual: bool) -> None:
    model = make(cell, num_layers, bidirectional, residual)
    x = torch.randn(4, 7, 5, dtype=torch.double)
    lengths = torch.tensor([7, 3, 1, 5])
    y, state = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        want, want_state = equations(model, x[row], length)
        assert torch.allclose(y[row, :length], want, atol=1e-10)
        if not bidirectional:
            assert torch.allclose(state.values[row], want_state, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_equal_those_of_the_equations(cell: str, bidirectional: bool) -> None:
    model = make(cell, 2, bidirectional)
    x = torch.randn(3, 6, 5, dtype=torch.double, requires_grad=True)
    lengths = torch.tensor([6, 2, 4])
    weight = torch.randn(6, model.output_size, dtype=torch.double)

    def gradients(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [x, *model.parameters()]))

    y, _ = model(x, lengths)
    fused = gradients(sum((y[b, :n] * weight[:n]).sum() for b, n in enumerate(lengths.tolist())))  # type: ignore[arg-type]
    plain = gradients(sum((equations(model, x[b], n)[0] * weight[:n]).sum() for b, n in enumerate(lengths.tolist())))  # type: ignore[arg-type]
    for one, two in zip(fused, plain, strict=True):
        assert torch.allclose(one, two, atol=1e-9)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_at_once_equal_single_steps(cell: str, num_layers: int) -> None:
    """In outputs, states and gradients; in float32, and to the last bit, since search relies on it."""
    model = Recurrent(cell, 16, 16, num_layers)  # type: ignore[arg-type]
    x = torch.randn(8, 9, 16)
    whole, end = model(x)
    state, pieces = None, []
    for t in range(9):
        y, state = model(x[:, t : t + 1], None, state)
        pieces.append(y)
    assert state is not None
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state.values, end.values)
    first, middle = model(x[:, :4])
    second, last = model(x[:, 4:], None, middle)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(last.values, end.values)
    one = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    two = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), list(model.parameters()))
    for g, h in zip(one, two, strict=True):
        assert torch.allclose(g, h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_neither_padding_nor_neighbours_are_read(cell: str, bidirectional: bool) -> None:
    model = Recurrent(cell, 16, 16, 2, bidirectional)  # type: ignore[arg-type]
    x = torch.randn(8, 9, 16)
    lengths = torch.tensor([9, 4, 1, 7, 7, 2, 9, 3])
    y, state = model(x, lengths)
    garbage = x.clone()
    for row, length in enumerate(lengths.tolist()):
        garbage[row, length:] = 1e4
    other, other_state = model(garbage, lengths)
    changed = torch.randn_like(x)
    changed[1] = x[1]
    third, third_state = model(changed, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(y[row, :length], other[row, :length])
    assert torch.equal(y[1, :4], third[1, :4])
    assert torch.equal(state.values, other_state.values)
    assert torch.equal(state.values[1], third_state.values[1])


def test_a_ragged_batch_goes_on_from_each_rows_own_state() -> None:
    model = Recurrent("lstm", 16, 16, 2)
    x = torch.randn(4, 10, 16)
    lengths = torch.tensor([3, 10, 6, 1])
    _, state = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        _, alone = model(x[:, :length])
        assert torch.equal(state.values[row], alone.values[row])


def test_initial_values() -> None:
    """Orthogonal recurrent weights gate by gate, forget bias 1, other biases 0, Xavier's variance for inputs."""
    layer = Recurrent("lstm", 300, 200).forward_layers[0]
    for gate in layer.weight_hh_l0.chunk(4):  # type: ignore[operator, union-attr]
        assert torch.allclose(gate @ gate.mT, torch.eye(200), atol=1e-5)
    bias = layer.bias_ih_l0 + layer.bias_hh_l0  # type: ignore[operator]
    assert torch.equal(bias, torch.cat([torch.zeros(200), torch.ones(200), torch.zeros(400)]))  # type: ignore[arg-type]
    assert abs(float(layer.weight_ih_l0.detach().var()) - 2 / 500) < 2e-4  # type: ignore[operator, union-attr, arg-type]


def test_state_rows_and_columns() -> None:
    state = State(torch.arange(12.0).view(3, 4))
    assert state.select(torch.tensor([2, 0, 2])).values[:, 0].tolist() == [8, 0, 8]
    assert state.concat(state).num_rows == 6
    assert torch.equal(State.from_bytes(state.to_bytes(), 4).values, state.values)


@pytest.mark.parametrize(("radius", "trend"), [(0.5, "vanish"), (1.0, "stay"), (1.5, "explode")])
def test_gradients_through_time(radius: float, trend: str) -> None:
    """With a recurrent matrix of spectral radius 0.5, 1 and 1.5 the gradient shrinks, stays and grows (Pascanu et al.
    2013), in a linear region of the cell, where the radius alone decides. Clipping then bounds the update."""
    model = Recurrent("rnn_relu", 8, 8).double()
    layer = model.forward_layers[0]
    with torch.no_grad():
        layer.weight_hh_l0.copy_(radius * torch.eye(8))  # type: ignore[operator, union-attr]
        layer.weight_ih_l0.copy_(torch.eye(8))  # type: ignore[operator, union-attr]
    steps = 40
    x = torch.rand(1, steps, 8, dtype=torch.double, requires_grad=True)  # positive: ReLU passes everything
    y, _ = model(x)
    (gradient,) = torch.autograd.grad(y[:, -1].sum(), x, retain_graph=True)
    norms = gradient[0].norm(dim=1)
    ratio = float(norms[0] / norms[-1])
    assert ratio == pytest.approx(radius ** (steps - 1), rel=1e-6)
    assert {"vanish": ratio < 1e-6, "stay": 0.99 < ratio < 1.01, "explode": ratio > 1e6}[trend]
    y[:, -1].sum().backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(clipped) == pytest.approx(min(1.0, float(total)), rel=1e-5)
