"""Recurrent: cell x layers x directions, on fused kernels where there is one.

The only file that knows the kernels' (layers·directions, batch, hidden) layout; everybody else sees padded batches
with the row on axis 0, and a State. Layers run one after another, each as one call over all T steps. A reverse
direction runs over each row reversed within its own length, so padding is never read and nothing is packed. Layers of
which no kernel exists stand in unfused.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.cells import NUM_GATES, CellWeights, MinimalWeights
from seqmodels.config import MINIMAL, Cell, RecurrentConfig
from seqmodels.dropout import locked_mask
from seqmodels.state import State
from seqmodels.unfused import MinimalLayer, SteppedLayer, UnfusedLayer

FORGET_GATE: dict[Cell, int] = {"lstm": 1, "min_lstm": 0}  # its place among the gates
# What `nn.RNNBase` calls in the end, by its `mode`.
_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class Recurrent(nn.Module):
    """(x (B, T, input_size), lengths (B,)?, State?) -> (y (B, T, output_size), State).

    With `lengths`, row b is read up to lengths[b] and its state is the one after that position; y beyond it is
    unspecified. Without, every row is T long. A one-directional stack starts from the given State (zeros if none)
    and returns one to go on from; a bidirectional one has read to both ends, so its State has no columns.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        residual: bool = False,
        dropout: float = 0.0,
        locked_dropout: bool = False,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        cell_zoneout: float = 0.0,
        memory_length: int | None = None,
    ) -> None:
        """dropout: between layers. locked_dropout: with one mask for all steps of a row. weight_dropout: of single
        weights from hidden to hidden, the same at all steps of a forward pass (Merity et al. 2018). layer_norm: as
        cells.py says for each cell (Ba et al. 2016). zoneout, cell_zoneout: of hidden units, and of an LSTM's cell,
        which keep their old value at a step (Krueger et al. 2017). memory_length: steps for which an LSTM's or GRU's
        gates keep what they hold at first, at most (Tallec and Ollivier 2018).
        """
        super().__init__()
        self.cell, self.hidden_size, self.num_layers = cell, hidden_size, num_layers
        self.bidirectional, self.residual = bidirectional, residual
        self.dropout, self.locked_dropout, self.weight_dropout = dropout, locked_dropout, weight_dropout
        self.zoneouts = (zoneout, cell_zoneout)[: self._parts]  # of each part of a layer's state
        self.output_size = hidden_size * (2 if bidirectional else 1)
        sizes = [input_size] + [self.output_size] * (num_layers - 1)
        make = partial(_layer, cell, hidden_size=hidden_size, layer_norm=layer_norm, zoneouts=self.zoneouts)
        self.forward_layers = nn.ModuleList(make(size) for size in sizes)
        self.backward_layers = nn.ModuleList(make(size) for size in (sizes if bidirectional else []))
        if memory_length is not None:
            for layer in (*self.forward_layers, *self.backward_layers):
                _remember(layer, cell, memory_length)

    @classmethod
    def from_config(cls, config: RecurrentConfig, input_size: int, locked_dropout: bool = False) -> "Recurrent":
        return cls(input_size=input_size, locked_dropout=locked_dropout, **config.model_dump())

    @property
    def state_width(self) -> int:
        """Columns of a State: hidden of every layer, then (LSTM only) cell of every layer."""
        if self.bidirectional:
            return 0
        return self.hidden_size * self.num_layers * self._parts

    @property
    def _parts(self) -> int:
        return 2 if self.cell == "lstm" else 1

    def weights(self) -> list[CellWeights] | list[MinimalWeights]:
        """Of each layer of a one-directional stack."""
        return [_weights(layer) for layer in self.forward_layers]  # type: ignore[return-value]  # all are of one kind

    def initial_state(self, rows: int) -> State:
        weight = next(self.parameters())
        return State(weight.new_zeros(rows, self.state_width))

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        drawn = self._draw(x)
        if self.bidirectional:
            return self._both_directions(x, lengths, drawn), self.initial_state(x.shape[0])
        state = state if state is not None else self.initial_state(x.shape[0])
        if lengths is None:
            return self._one_direction(x, state, drawn)
        return self._ragged(x, lengths, state, drawn)

    def _draw(self, x: Tensor) -> "_Drawn":
        drawn = _Drawn()
        if self.training and self.weight_dropout > 0:
            for layer in (*self.forward_layers, *self.backward_layers):
                drawn.matrices[layer] = F.dropout(layer.get_parameter("weight_hh_l0"), self.weight_dropout)
        if self.training and self.locked_dropout and self.dropout > 0:
            between = x.new_empty(x.shape[0], 1, self.output_size)
            drawn.masks.extend(locked_mask(between, self.dropout) for _ in range(self.num_layers - 1))
        return drawn

    def _one_direction(self, x: Tensor, state: State, drawn: "_Drawn") -> tuple[Tensor, State]:
        parts = state.values.view(-1, self._parts, self.num_layers, self.hidden_size)
        finals = []
        for index, layer in enumerate(self.forward_layers):
            y, final = _run(layer, x, parts[:, :, index], drawn)
            x = self._between(index, x, y, drawn)
            finals.append(final)
        return x, State(torch.stack(finals, dim=2).flatten(1))

    def _ragged(self, x: Tensor, lengths: Tensor, state: State, drawn: "_Drawn") -> tuple[Tensor, State]:
        """Rows end at different steps: run from one end to the next, and keep each row's state where it ends.

        A fused kernel gives the same bits for T steps at once or split, so cutting costs launches, not exactness.
        """
        ends = sorted(set(lengths.tolist()))
        outputs, kept = [], state.values
        for start, end in pairwise([0, *ends]):
            y, state = self._one_direction(x[:, start:end], state, drawn)
            outputs.append(y)
            kept = torch.where((lengths >= end)[:, None], state.values, kept)
        rest = x.new_zeros(x.shape[0], x.shape[1] - ends[-1], self.output_size)
        return torch.cat([*outputs, rest], dim=1), State(kept)

    def _both_directions(self, x: Tensor, lengths: Tensor | None, drawn: "_Drawn") -> Tensor:
        mirror = _mirror(x.shape[0], x.shape[1], lengths, x.device)
        for index, (ahead, back) in enumerate(zip(self.forward_layers, self.backward_layers, strict=True)):
            zeros = x.new_zeros(x.shape[0], self._parts, self.hidden_size)
            y_ahead, _ = _run(ahead, x, zeros, drawn)
            y_back, _ = _run(back, _take(x, mirror), zeros, drawn)
            x = self._between(index, x, torch.cat([y_ahead, _take(y_back, mirror)], dim=2), drawn)
        return x

    def _between(self, index: int, x: Tensor, y: Tensor, drawn: "_Drawn") -> Tensor:
        """What the next layer reads, given this layer's input x and output y."""
        if self.residual and index > 0:
            y = y + x
        if index == self.num_layers - 1:
            return y
        return y * drawn.masks[index] if drawn.masks else F.dropout(y, self.dropout, self.training)


@dataclass(frozen=True)
class _Drawn:
    """What training draws once for a forward pass, so that all steps share it, in whatever pieces they are computed.

    masks: for what stands between two layers a factor (B, 1, output_size); none where each step draws its own.
    matrices: what a layer has as W_h (G·H, H) in this pass, where weights are dropped.
    """

    masks: list[Tensor] = field(default_factory=list)
    matrices: dict[nn.Module, Tensor] = field(default_factory=dict)


def _layer(cell: Cell, input_size: int, hidden_size: int, layer_norm: bool, zoneouts: Sequence[float]) -> nn.Module:
    """One layer in one direction, Xavier for input weights, orthogonal for recurrent ones, forget bias 1, gains 1.

    Jozefowicz et al. 2015 show what the forget bias is worth, Feng et al. 2024 that it is worth as much in a minLSTM.
    """
    layer: nn.Module
    if cell in MINIMAL:
        layer = MinimalLayer(cell, input_size, hidden_size, zoneouts)
    elif layer_norm or any(zoneouts):
        layer = SteppedLayer(cell, input_size, hidden_size, layer_norm, zoneouts)
    else:
        layer = _fused_layer(cell, input_size, hidden_size)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        for gate in parameter.chunk(NUM_GATES[cell]) if "weight" in name else ():
            nn.init.orthogonal_(gate) if "weight_hh" in name else nn.init.xavier_uniform_(gate)
    if cell in FORGET_GATE:
        with torch.no_grad():
            layer.get_parameter("bias_ih_l0").chunk(NUM_GATES[cell])[FORGET_GATE[cell]].fill_(1.0)
    return layer


def _remember(layer: nn.Module, cell: Cell, length: int) -> None:
    """Chrono initialisation: a unit whose gate keeps its value with bias log(T - 1) forgets it in about T steps. T is
    drawn for each unit, and an LSTM's input gate closed by as much as its forget gate is open."""
    gates = layer.get_parameter("bias_ih_l0").chunk(NUM_GATES[cell])
    with torch.no_grad():
        keep = torch.empty_like(gates[1]).uniform_(1, length - 1).log()
        gates[1].copy_(keep)  # forget gate of an LSTM, update gate of a GRU
        if cell == "lstm":
            gates[0].copy_(-keep)


def _fused_layer(cell: Cell, input_size: int, hidden_size: int) -> nn.RNNBase:
    if cell == "lstm":
        return nn.LSTM(input_size, hidden_size, batch_first=True)
    if cell == "gru":
        return nn.GRU(input_size, hidden_size, batch_first=True)
    return nn.RNN(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"), batch_first=True)


def _weights(layer: nn.Module) -> CellWeights | MinimalWeights:
    if isinstance(layer, SteppedLayer | MinimalLayer):
        return layer.weights()
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    return CellWeights(*(layer.get_parameter(name) for name in names))


def _run(layer: nn.Module, x: Tensor, parts: Tensor, drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """One call for all steps. x: (B, T, in); parts: (B, P, H), hidden and an LSTM's cell. Returns y (B, T, H) and the
    parts after T."""
    if isinstance(layer, UnfusedLayer):
        y, last = layer(x, parts, drawn.matrices.get(layer))
        return y, last
    first = [part[None].contiguous() for part in parts.unbind(1)]  # kernels want (1, B, H)
    hidden = tuple(first) if len(first) == 2 else first[0]
    if layer in drawn.matrices:
        y, last = _run_with(drawn.matrices[layer], layer, x, hidden)
    else:
        y, last = layer(x, hidden)
    return y, torch.stack([part[0] for part in last], 1) if isinstance(last, tuple) else last[0][:, None]


def _run_with(
    matrix: Tensor, layer: nn.Module, x: Tensor, hidden: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """The same fused kernel with another W_h. It is given all weights here, so that the flat list of them that a layer
    keeps, which would go on holding its own W_h, has no part in it. On a GPU, cuDNN copies them to one piece of memory
    at each call, and torch warns of that once."""
    input_weight, *biases = (layer.get_parameter(name) for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))
    kernel = _KERNELS[str(layer.mode)]
    y, *last = kernel(x, hidden, [input_weight, matrix, *biases], True, 1, 0.0, layer.training, False, True)
    return y, tuple(last) if len(last) == 2 else last[0]


def _mirror(rows: int, steps: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Index (B, T) that reverses each row within its length and leaves padding where it is.

    lengths 3, T 5: 2 1 0 3 4. Applying it twice changes nothing.
    """
    positions = torch.arange(steps, device=device)
    ends = torch.full((rows, 1), steps, device=device) if lengths is None else lengths.to(device)[:, None]
    return torch.where(positions < ends, ends - 1 - positions, positions)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
