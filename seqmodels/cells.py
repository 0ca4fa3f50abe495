"""The equations in plain sight: one step of RNN, GRU and LSTM, of their layer-normalised forms, and of the minimal
cells; gates and all.

Each cell is written once, as an `update` by the products W_x x and W_h h. Layers without a fused kernel (`unfused.py`)
and the decoding step run these very functions; the fused kernels are held to them by tests. Weights are laid out as
torch lays them out: gates stacked along axis 0, in the order named in each function.

Sources: vanilla, Elman 1990; LSTM with forget gate, Gers et al. 2000; GRU, Cho et al. 2014, in the form where the
reset gate acts after the recurrent product (the one that cuDNN computes). Layer normalisation, Ba, Kiros and Hinton
2016, equation 4 and the supplement; zoneout, Krueger et al. 2017; minimal cells, Feng et al. 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.config import Cell

NUM_GATES: dict[Cell, int] = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4, "min_gru": 2, "min_lstm": 3}


@dataclass(frozen=True)
class CellWeights:
    """One layer in one direction. G gates: 1 for the vanilla cell, 3 for the GRU, 4 for the LSTM.

    The last four are there where the layer is normalised. The vanilla cell has one gain alone, of the sum of both
    products.
    """

    input: Tensor  # W_x (G·H, D)
    recurrent: Tensor  # W_h (G·H, H)
    input_bias: Tensor  # b_x (G·H,)
    recurrent_bias: Tensor  # b_h (G·H,)
    input_gain: Tensor | None = None  # of W_x x (G·H,)
    recurrent_gain: Tensor | None = None  # of W_h h (G·H,)
    cell_gain: Tensor | None = None  # of an LSTM's cell (H,)
    cell_bias: Tensor | None = None  # (H,)


@dataclass(frozen=True)
class MinimalWeights:
    """One layer of a minimal cell, which has no recurrent matrix. G gates: 2 for the GRU, 3 for the LSTM."""

    input: Tensor  # W_x (G·H, D)
    bias: Tensor  # b (G·H,)


@dataclass(frozen=True)
class Step:
    """What one step leaves behind: hidden (B, H), cell (B, H) for an LSTM only, and each gate (B, H) by name."""

    hidden: Tensor
    cell: Tensor | None
    gates: dict[str, Tensor]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.hidden,) if self.cell is None else (self.hidden, self.cell)


def rnn_step(x: Tensor, hidden: Tensor, weights: CellWeights, relu: bool = False) -> Step:
    """h_t = tanh(W_x x_t + W_h h_{t-1} + b), or ReLU in place of tanh. x: (B, D), hidden: (B, H).

    Normalised (Ba et al. 2016, equation 4): h_t = tanh(LN(W_x x_t + W_h h_{t-1}) + b).
    """
    return rnn_update(x @ weights.input.mT, hidden @ weights.recurrent.mT, weights, relu)


def rnn_update(from_input: Tensor, from_hidden: Tensor, weights: CellWeights, relu: bool = False) -> Step:
    """from_input: W_x x (B, H); from_hidden: W_h h (B, H)."""
    total = _normalised(from_input + from_hidden, weights.input_gain) + weights.input_bias + weights.recurrent_bias
    return Step(torch.relu(total) if relu else torch.tanh(total), None, {})


def lstm_step(x: Tensor, hidden: Tensor, cell: Tensor, weights: CellWeights) -> Step:
    """Decide what to forget, what new to remember, what to output.

    i, f, o = sigmoid(W_x x_t + W_h h_{t-1} + b);  g = tanh(...);  c_t = f * c_{t-1} + i * g;  h_t = o * tanh(c_t).
    x: (B, D), hidden and cell: (B, H). Gate order in the weights: i, f, g, o.

    Normalised (Ba et al. 2016, supplement): LN(W_x x_t) + LN(W_h h_{t-1}) + b, each over all four gates at once, and
    h_t = o * tanh(LN(c_t)), where that LN has a bias too. The cell itself is carried on as it is.
    """
    return lstm_update(x @ weights.input.mT, hidden @ weights.recurrent.mT, cell, weights)


def lstm_update(from_input: Tensor, from_hidden: Tensor, cell: Tensor, weights: CellWeights) -> Step:
    """from_input: W_x x (B, 4·H); from_hidden: W_h h (B, 4·H)."""
    total = _normalised(from_input, weights.input_gain) + _normalised(from_hidden, weights.recurrent_gain)
    i, f, g, o = (total + weights.input_bias + weights.recurrent_bias).chunk(4, dim=1)
    i, f, g, o = _sigmoid(i), _sigmoid(f), torch.tanh(g), _sigmoid(o)
    new_cell = f * cell + i * g
    seen = _normalised(new_cell, weights.cell_gain, weights.cell_bias)
    return Step(o * torch.tanh(seen), new_cell, {"input": i, "forget": f, "candidate": g, "output": o})


def gru_step(x: Tensor, hidden: Tensor, weights: CellWeights) -> Step:
    """Blend the old state with a candidate.

    r, z = sigmoid(...);  n = tanh(W_x x_t + b_x + r * (W_h h_{t-1} + b_h));  h_t = (1 - z) * n + z * h_{t-1}.
    x: (B, D), hidden: (B, H). Gate order in the weights: r, z, n.

    Normalised (Ba et al. 2016, supplement): LN(W_x x_t) and LN(W_h h_{t-1}) in place of the products, both over r and z
    together and over n by itself.
    """
    return gru_update(x @ weights.input.mT, hidden @ weights.recurrent.mT, hidden, weights)


def gru_update(from_input: Tensor, from_hidden: Tensor, hidden: Tensor, weights: CellWeights) -> Step:
    """from_input: W_x x (B, 3·H); from_hidden: W_h h (B, 3·H)."""
    xr, xz, xn = _gru_sums(from_input, weights.input_gain, weights.input_bias).chunk(3, dim=1)
    hr, hz, hn = _gru_sums(from_hidden, weights.recurrent_gain, weights.recurrent_bias).chunk(3, dim=1)
    r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return Step((1 - z) * n + z * hidden, None, {"reset": r, "update": z, "candidate": n})


Update = Callable[[Tensor, Tensor, Sequence[Tensor], CellWeights], Step]
# By cell: (W_x x, W_h h, hidden and an LSTM's cell, weights) -> Step.
UPDATES: dict[Cell, Update] = {
    "rnn_tanh": lambda from_input, from_hidden, parts, weights: rnn_update(from_input, from_hidden, weights),
    "rnn_relu": lambda from_input, from_hidden, parts, weights: rnn_update(from_input, from_hidden, weights, relu=True),
    "gru": lambda from_input, from_hidden, parts, weights: gru_update(from_input, from_hidden, parts[0], weights),
    "lstm": lambda from_input, from_hidden, parts, weights: lstm_update(from_input, from_hidden, parts[1], weights),
}


def minimal_step(x: Tensor, hidden: Tensor, weights: MinimalWeights, cell: Cell) -> Step:
    """h_t = k * h_{t-1} + (1 - k) * n, where the share k that is kept and the candidate n = W_n x_t + b depend on the
    input alone. x: (B, D), hidden: (B, H).

    The real-valued form of Feng et al. 2024 (their section 3), without the function g that their appendix puts around
    the candidate: it makes all states positive for the sake of a scan in logarithms, which ours is not.
    """
    keep, candidate = SHARES[cell](x @ weights.input.mT, weights)
    return Step(keep * hidden + (1 - keep) * candidate, None, {"keep": keep, "candidate": candidate})


def min_gru_shares(from_input: Tensor, weights: MinimalWeights) -> tuple[Tensor, Tensor]:
    """k = 1 - z;  z = sigmoid(W_z x_t + b). from_input: W_x x (..., 2·H). Gate order in the weights: z, n."""
    z, candidate = (from_input + weights.bias).chunk(2, dim=-1)
    return _sigmoid(-z), candidate


def min_lstm_shares(from_input: Tensor, weights: MinimalWeights) -> tuple[Tensor, Tensor]:
    """k = f / (f + i);  f, i = sigmoid(W_x x_t + b). from_input: W_x x (..., 3·H). Gate order in the weights: f, i, n.

    As (1 + exp(-i)) / (2 + exp(-i) + exp(-f)), scaled by the largest, since f + i may be 0 in float32.
    """
    f, i, candidate = (from_input + weights.bias).chunk(3, dim=-1)
    largest = torch.maximum(-f, -i).detach().clamp(min=0)  # cancels out, so it needs no gradient
    one, not_f, not_i = torch.exp(-largest), torch.exp(-f - largest), torch.exp(-i - largest)
    return (one + not_i) / (2 * one + not_i + not_f), candidate


# By cell: (W_x x, weights) -> what is kept of the hidden state, and the candidate for the rest.
SHARES: dict[Cell, Callable[[Tensor, MinimalWeights], tuple[Tensor, Tensor]]] = {
    "min_gru": min_gru_shares,
    "min_lstm": min_lstm_shares,
}


def zoneout(old: Tensor | float, new: Tensor, rate: float, kept: Tensor | None) -> Tensor:
    """Each unit keeps its old value with probability `rate` (Krueger et al. 2017). kept: which do, in training. Without
    it the expectation. Of an LSTM, both states are those of the step without zoneout."""
    if rate == 0:
        return new
    return rate * old + (1 - rate) * new if kept is None else torch.where(kept, old, new)


def _normalised(x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x (B, O) with mean 0 and variance 1 in each row, times the gain; as it is where there is none."""
    return x if gain is None else F.layer_norm(x, gain.shape, gain, bias)


def _gru_sums(products: Tensor, gain: Tensor | None, bias: Tensor) -> Tensor:
    if gain is None:
        return products + bias
    both = 2 * len(gain) // 3
    gates, candidate = products.tensor_split([both], dim=1)
    return torch.cat([_normalised(gates, gain[:both]), _normalised(candidate, gain[both:])], 1) + bias


def _sigmoid(x: Tensor) -> Tensor:
    """Torch's own gives an element other last bits where it stands at the end of a tensor; its tanh does not."""
    return torch.tanh(x * 0.5) * 0.5 + 0.5
