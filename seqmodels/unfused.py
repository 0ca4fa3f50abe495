"""Layers without a fused kernel: normalised ones, those with zoneout, and the minimal cells.

All are called as layer(x (B, T, D), parts (B, P, H), matrix?) -> (y (B, T, H), parts after T), where the parts are
hidden and, of an LSTM, cell. What the input adds is one product for all steps. The equations stand in cells.py.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.cells import NUM_GATES, SHARES, UPDATES, CellWeights, MinimalWeights, zoneout
from seqmodels.config import Cell
from seqmodels.scan import linear_recurrence

Product = Callable[[Tensor], Tensor]  # x (N, I) -> x W^T (N, O), of a matrix W (O, I)


class UnfusedLayer(nn.Module):
    """One layer in one direction, whose parameters have the names that torch gives those of a fused one."""

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, zoneouts: Sequence[float]) -> None:
        """zoneouts: of hidden and, of an LSTM, cell."""
        super().__init__()
        self._cell: Cell = cell
        self._zoneouts = zoneouts
        self._products: list[Product] = []
        self.weight_ih_l0 = nn.Parameter(torch.empty(NUM_GATES[cell] * hidden_size, input_size))
        self.bias_ih_l0 = nn.Parameter(torch.zeros(NUM_GATES[cell] * hidden_size))

    def matrices(self) -> list[Tensor]:
        raise NotImplementedError

    def on(self, products: Sequence[Product]) -> Self:
        """The same layer with the products of its matrices computed by others, for inference."""
        twin = copy.copy(self)
        twin._products = list(products)
        return twin

    def _read(self, product: Product, x: Tensor) -> Tensor:
        """W_x x (N, T, G·H) of x (N, T, D). Of the weights' type, under autocast too: sums are not of 16 bits."""
        return product(x.flatten(0, 1)).to(self.weight_ih_l0.dtype).view(*x.shape[:2], -1)

    def _kept(self, rate: float, size: Sequence[int]) -> Tensor | None:
        """Which units keep their old values in training; None where it is the expectation that counts."""
        if not self.training or rate == 0:
            return None
        return torch.empty(size, device=self.weight_ih_l0.device).bernoulli_(rate).bool()


class SteppedLayer(UnfusedLayer):
    """RNN, GRU and LSTM step by step, with layer normalisation, zoneout or both."""

    def __init__(
        self, cell: Cell, input_size: int, hidden_size: int, layer_norm: bool, zoneouts: Sequence[float]
    ) -> None:
        super().__init__(cell, input_size, hidden_size, zoneouts)
        size = NUM_GATES[cell] * hidden_size
        self.weight_hh_l0 = nn.Parameter(torch.empty(size, hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.zeros(size))
        together = cell in ("rnn_tanh", "rnn_relu")  # both products are normalised as one sum
        self.gain_ih_l0 = nn.Parameter(torch.ones(size)) if layer_norm else None
        self.gain_hh_l0 = nn.Parameter(torch.ones(size)) if layer_norm and not together else None
        self.gain_cell_l0 = nn.Parameter(torch.ones(hidden_size)) if layer_norm and cell == "lstm" else None
        self.bias_cell_l0 = nn.Parameter(torch.zeros(hidden_size)) if layer_norm and cell == "lstm" else None

    def weights(self) -> CellWeights:
        return CellWeights(
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            self.gain_ih_l0,
            self.gain_hh_l0,
            self.gain_cell_l0,
            self.bias_cell_l0,
        )

    def matrices(self) -> list[Tensor]:
        return [self.weight_ih_l0, self.weight_hh_l0]

    def forward(self, x: Tensor, parts: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """matrix: in place of W_h, where weights are dropped."""
        weights, update = self.weights(), UPDATES[self._cell]
        recurrent = weights.recurrent if matrix is None else matrix
        from_input, from_hidden = self._products or [partial(F.linear, weight=w) for w in (weights.input, recurrent)]
        inputs = self._read(from_input, x.transpose(0, 1))  # (T, B, G·H), so that each step's lie together
        now = parts.to(inputs.dtype).unbind(1)
        kept = [self._kept(rate, (len(inputs), *now[0].shape)) for rate in self._zoneouts]
        outputs = []
        for t, step_inputs in enumerate(inputs.unbind(0)):
            step = update(step_inputs, from_hidden(now[0]).to(inputs.dtype), now, weights)
            now = tuple(
                zoneout(old, new, rate, None if mask is None else mask[t])
                for old, new, rate, mask in zip(now, step.parts, self._zoneouts, kept, strict=True)
            )
            outputs.append(now[0])
        return torch.stack(outputs, 1), torch.stack(now, 1)


class MinimalLayer(UnfusedLayer):
    """minGRU and minLSTM: linear in the state, so all steps are solved for at once."""

    def weights(self) -> MinimalWeights:
        return MinimalWeights(self.weight_ih_l0, self.bias_ih_l0)

    def matrices(self) -> list[Tensor]:
        return [self.weight_ih_l0]

    def forward(self, x: Tensor, parts: Tensor, matrix: None = None) -> tuple[Tensor, Tensor]:
        (product,) = self._products or [partial(F.linear, weight=self.weight_ih_l0)]
        keep, candidate = SHARES[self._cell](self._read(product, x), self.weights())
        rate, added = self._zoneouts[0], (1 - keep) * candidate
        kept = self._kept(rate, keep.shape)
        # A unit that keeps its old value has a = 1 and b = 0.
        y = linear_recurrence(
            zoneout(1.0, keep, rate, kept), zoneout(0.0, added, rate, kept), parts[:, 0].to(keep.dtype)
        )
        return y, y[:, -1:]
