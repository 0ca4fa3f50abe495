"""The equations in plain sight: one step of RNN, GRU and LSTM, gates and all.

Reference and inspection. `Recurrent` runs the same equations on fused kernels, and a test holds the two together.
Weights are laid out as torch lays them out: gates stacked along axis 0, in the order named in each function.

Sources: vanilla, Elman 1990; LSTM with forget gate, Gers et al. 2000; GRU, Cho et al. 2014, in the form where the
reset gate acts after the recurrent product (the one that cuDNN computes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CellWeights:
    """One layer in one direction. G gates: 1 for the vanilla cell, 3 for the GRU, 4 for the LSTM."""

    input: Tensor  # W_x (G·H, D)
    recurrent: Tensor  # W_h (G·H, H)
    input_bias: Tensor  # b_x (G·H,)
    recurrent_bias: Tensor  # b_h (G·H,)


@dataclass(frozen=True)
class Step:
    """What one step leaves behind: hidden (B, H), cell (B, H) for an LSTM only, and each gate (B, H) by name."""

    hidden: Tensor
    cell: Tensor | None
    gates: dict[str, Tensor]


def rnn_step(x: Tensor, hidden: Tensor, weights: CellWeights, relu: bool = False) -> Step:
    """h_t = tanh(W_x x_t + W_h h_{t-1} + b), or ReLU in place of tanh. x: (B, D), hidden: (B, H)."""
    total = x @ weights.input.mT + weights.input_bias + hidden @ weights.recurrent.mT + weights.recurrent_bias
    return Step(torch.relu(total) if relu else torch.tanh(total), None, {})


def lstm_step(x: Tensor, hidden: Tensor, cell: Tensor, weights: CellWeights) -> Step:
    """Decide what to forget, what new to remember, what to output.

    i, f, o = sigmoid(W_x x_t + W_h h_{t-1} + b);  g = tanh(...);  c_t = f * c_{t-1} + i * g;  h_t = o * tanh(c_t).
    x: (B, D), hidden and cell: (B, H). Gate order in the weights: i, f, g, o.
    """
    total = x @ weights.input.mT + weights.input_bias + hidden @ weights.recurrent.mT + weights.recurrent_bias
    i, f, g, o = total.chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    new_cell = f * cell + i * g
    return Step(o * torch.tanh(new_cell), new_cell, {"input": i, "forget": f, "candidate": g, "output": o})


def gru_step(x: Tensor, hidden: Tensor, weights: CellWeights) -> Step:
    """Blend the old state with a candidate.

    r, z = sigmoid(...);  n = tanh(W_x x_t + b_x + r * (W_h h_{t-1} + b_h));  h_t = (1 - z) * n + z * h_{t-1}.
    x: (B, D), hidden: (B, H). Gate order in the weights: r, z, n.
    """
    from_input = x @ weights.input.mT + weights.input_bias
    from_hidden = hidden @ weights.recurrent.mT + weights.recurrent_bias
    xr, xz, xn = from_input.chunk(3, dim=1)
    hr, hz, hn = from_hidden.chunk(3, dim=1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return Step((1 - z) * n + z * hidden, None, {"reset": r, "update": z, "candidate": n})
