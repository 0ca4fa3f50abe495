"""Each kind of recurrence against the equations in plain sight, and against itself cut in pieces."""

import pytest
import torch
from torch import Tensor

from seqmodels.cells import NUM_GATES, CellWeights, MinimalWeights, Step, gru_step, lstm_step, minimal_step, rnn_step
from seqmodels.config import Cell
from seqmodels.recurrent import Recurrent, _weights
from seqmodels.state import State
from tests.seqmodels.builders import RECURRENCES


def one_step(cell: Cell, x: Tensor, parts: tuple[Tensor, ...], weights: CellWeights | MinimalWeights) -> Step:
    if isinstance(weights, MinimalWeights):
        return minimal_step(x, *parts, weights, cell)
    if cell == "lstm":
        return lstm_step(x, *parts, weights)
    return gru_step(x, *parts, weights) if cell == "gru" else rnn_step(x, *parts, weights, relu=cell == "rnn_relu")


def equations(model: Recurrent, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One row (T, in) through the step functions of cells.py: outputs (length, out) and the State's columns. Under
    zoneout, with the expectation at each step."""
    layers = list(zip(model.forward_layers, model.backward_layers or [None] * model.num_layers, strict=True))
    ends = []
    y = x[:length]
    for index, pair in enumerate(layers):
        outputs = []
        for direction, layer in enumerate(pair):
            if layer is None:
                continue
            weights = _weights(layer)
            parts = (torch.zeros(1, model.hidden_size, dtype=x.dtype),) * len(model.zoneouts)
            steps = []
            for t in range(length) if direction == 0 else reversed(range(length)):
                after = one_step(model.cell, y[t : t + 1], parts, weights).parts
                parts = tuple(p * h + (1 - p) * g for p, h, g in zip(model.zoneouts, parts, after, strict=True))
                steps.append(parts[0])
            outputs.append(torch.cat(steps if direction == 0 else steps[::-1]))
        out = torch.cat(outputs, 1)
        y = out + y if model.residual and index > 0 else out
        ends.append(parts)
    return y, torch.cat([part for kind in zip(*ends, strict=True) for part in kind], 1)[0]


def make(
    kind: str, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False,
    residual: bool = False,
) -> Recurrent:  # fmt: skip
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    return Recurrent(**RECURRENCES[kind], **sizes, bidirectional=bidirectional, residual=residual).eval()


def scrambled(model: Recurrent) -> Recurrent:
    """With biases and gains that are not those of the start."""
    for name, parameter in model.named_parameters():
        if "weight" not in name:
            parameter.data.add_(torch.randn_like(parameter) / 2)
    return model


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_it_computes_the_equations(kind: str, num_layers: int, bidirectional: bool, residual: bool) -> None:
    model = scrambled(make(kind, 5, 6, num_layers, bidirectional, residual)).double()
    x = torch.randn(4, 7, 5, dtype=torch.double)
    lengths = torch.tensor([7, 3, 1, 5])
    y, state = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        want, want_state = equations(model, x[row], length)
        assert torch.allclose(y[row, :length], want, atol=1e-10)
        if not bidirectional:
            assert torch.allclose(state.values[row], want_state, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_gradients_equal_those_of_the_equations(kind: str, bidirectional: bool) -> None:
    model = scrambled(make(kind, 5, 6, 2, bidirectional)).double()
    x = torch.randn(3, 6, 5, dtype=torch.double, requires_grad=True)
    lengths = torch.tensor([6, 2, 4])
    weight = torch.randn(6, model.output_size, dtype=torch.double)

    def gradients(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [x, *model.parameters()]))

    y, _ = model(x, lengths)
    fused = gradients(sum((y[b, :n] * weight[:n]).sum() for b, n in enumerate(lengths.tolist())))  # type: ignore[arg-type]
    plain = gradients(sum((equations(model, x[b], n)[0] * weight[:n]).sum() for b, n in enumerate(lengths.tolist())))  # type: ignore[arg-type]
    for one, two in zip(fused, plain, strict=True):
        assert torch.allclose(one, two, atol=1e-9) and one.any()  # and each parameter has one


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_many_steps_at_once_equal_single_steps(kind: str, num_layers: int) -> None:
    """In outputs, states and gradients; in float32, and to the last bit, since search relies on it."""
    model = make(kind, 16, 16, num_layers)
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
@pytest.mark.parametrize("kind", RECURRENCES)
def test_neither_padding_nor_neighbours_are_read(kind: str, bidirectional: bool) -> None:
    model = make(kind, 16, 16, 2, bidirectional)
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


@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_ragged_batch_goes_on_from_each_rows_own_state(kind: str) -> None:
    model = make(kind, 16, 16, 2)
    x = torch.randn(4, 10, 16)
    lengths = torch.tensor([3, 10, 6, 1])
    _, state = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        _, alone = model(x[:, :length])
        assert torch.equal(state.values[row], alone.values[row])


@pytest.mark.parametrize("kind", ["lstm", "normalised LSTM"])
def test_initial_values(kind: str) -> None:
    """Orthogonal recurrent weights gate by gate, forget bias 1, other biases 0, Xavier's variance for inputs."""
    layer = make(kind, 300, 200).forward_layers[0]
    assert all(bool((p == 1).all()) for name, p in layer.named_parameters() if "gain" in name)
    for gate in layer.weight_hh_l0.chunk(4):  # type: ignore[operator, union-attr]
        assert torch.allclose(gate @ gate.mT, torch.eye(200), atol=1e-5)
    bias = layer.bias_ih_l0 + layer.bias_hh_l0  # type: ignore[operator]
    assert torch.equal(bias, torch.cat([torch.zeros(200), torch.ones(200), torch.zeros(400)]))  # type: ignore[arg-type]
    assert abs(float(layer.weight_ih_l0.detach().var()) - 2 / 500) < 2e-4  # type: ignore[operator, union-attr, arg-type]


def test_initial_values_of_minimal_cells() -> None:
    """As those of the others: half of a minGRU's state is kept at first, and a minLSTM's forget bias is 1."""
    assert not make("min_gru", 300, 200).forward_layers[0].get_parameter("bias_ih_l0").any()
    layer = make("min_lstm", 300, 200).forward_layers[0]
    assert torch.equal(layer.get_parameter("bias_ih_l0"), torch.cat([torch.ones(200), torch.zeros(400)]))
    assert abs(float(layer.get_parameter("weight_ih_l0").detach().var()) - 2 / 500) < 2e-4


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


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_begin_with_memories_of_all_lengths_up_to_the_one_given(cell: Cell) -> None:
    torch.manual_seed(0)
    layer = Recurrent(cell, 3, 600, memory_length=101).forward_layers[0]
    gates = layer.get_parameter("bias_ih_l0").chunk(NUM_GATES[cell])
    lengths = gates[1].detach().exp()  # sigmoid(b) = 1 - 1 / T where b = log(T - 1)
    assert 1 <= lengths.min() < 3 and 98 < lengths.max() <= 100
    assert float(lengths.mean()) == pytest.approx(50.5, abs=5), "drawn evenly"
    others = [gate for place, gate in enumerate(gates) if place != 1]
    if cell == "lstm":
        assert torch.equal(gates[0], -gates[1])
        others = others[1:]
    assert all(not gate.any() for gate in others)


def test_a_unit_keeps_its_value_for_as_long_as_its_gate_was_drawn() -> None:
    torch.manual_seed(0)
    stack = Recurrent("lstm", 1, 200, memory_length=50)
    layer = stack.forward_layers[0]
    with torch.no_grad():  # gates that see nothing but their biases
        layer.get_parameter("weight_ih_l0").zero_()
        layer.get_parameter("weight_hh_l0").zero_()
        kept = torch.sigmoid(layer.get_parameter("bias_ih_l0")[200:400])
        state = State(torch.cat([torch.zeros(1, 200), torch.ones(1, 200)], 1))
        _, after = stack(torch.zeros(1, 20, 1), None, state)
    assert torch.allclose(after.values[0, 200:], kept**20, atol=1e-5)
