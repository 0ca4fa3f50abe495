"""Linear maps and recurrent layers with weights laid out once for the processor: what inference spends its time in.

Knows how each device computes them fastest; docs/performance.md says what was measured.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import Weights
from seqmodels.errors import ConfigError
from seqmodels.unfused import UnfusedLayer


class Linear(Protocol):
    """x (N, D) -> x W^T + b (N, O). With `plus` (N, O), that in place of b."""

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor: ...


LARGEST_INT8, MIDDLE_UINT8 = 127, 128
LSTM_MODE = 2  # what torch's kernels call it
PACKED_FOR_ROWS = 32  # oneDNN chooses a layout by the number of rows it expects; measured the same from 4 to 160


class PackedLinear:
    """y = x W^T + b for rows x (N, D), W (O, D), b (O,) or None: y (N, O). With `plus` (N, O), that in place of b.

    On a CPU with oneDNN the weight is reordered once into the blocks that its kernels read; `F.linear` goes through
    another library, two to four times slower for the few rows of a step on the machines measured, and gives other
    last bits to 1 to 3 rows. A later change of the given weight may not be seen.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) if self._packed else weight

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        bias = self._bias if plus is None else None
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._weight, bias, "none", [], "")
        else:
            y = F.linear(x, self._weight, bias)
        return y if plus is None else y.add_(plus)


class Int8Linear:
    """The same in whole numbers: weights with a scale per output, inputs with a scale per row.

    Several times as fast as float32 on a CPU with 8-bit dot products; docs/performance.md says what it costs in BLEU. A
    scale per row, not per batch, and sums of whole numbers keep a row's bits independent of its neighbours. The
    instruction (VNNI) multiplies numbers without a sign by numbers with one: given both with a sign, oneDNN has no
    kernel on processors without AMX and goes through a loop that takes seconds. CPUs without VNNI get that loop, since
    unsigned numbers would overflow there.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Raises ConfigError on a GPU, and where torch has no oneDNN."""
        if not _packs(weight):
            raise ConfigError("int8 weights need a CPU and a torch built with oneDNN; use float32")
        weight = weight.detach()
        self._scale = _scale(weight)[:, 0]  # (O,)
        self._weight = torch.ops.onednn.qlinear_prepack((weight / self._scale[:, None]).round().to(torch.int8), None)
        self._bias = torch.zeros_like(self._scale) if bias is None else bias.detach()
        self._no_offset = torch.zeros_like(self._scale, dtype=torch.int64)
        self._zero, self._dtype = (MIDDLE_UINT8, torch.uint8) if has_vnni() else (0, torch.int8)  # of inputs

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        scale = _scale(x)
        whole = (x / scale).round_().add_(self._zero).to(self._dtype)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, self._zero, self._weight, self._scale, self._no_offset, None, 1.0, 0, torch.float32, "none",
            [], "",
        )  # fmt: skip  # already times the outputs' scales
        return torch.addcmul(self._bias if plus is None else plus, products, scale, out=products)


class HalfLinear:
    """The same with weights and inputs in 16 bits, and sums in float32, which are what it gives: for GPUs.

    So what stands between two products (cell equations, attention, softmax, scores) stays in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> None:
        """Raises ConfigError on a CPU, and for weights that are too large for the type."""
        if not _on_gpu(weight):
            raise ConfigError("float16 and bfloat16 weights need a CUDA device; use float32 or int8")
        self._weight = weight.detach().to(dtype).mT  # (D, O)
        if not self._weight.isfinite().all():
            raise ConfigError("a weight of this model is too large for float16; use bfloat16 or float32")
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        y = _float32_product(x.to(self._weight.dtype), self._weight)
        added = self._bias if plus is None else plus
        return y if added is None else y.add_(added)


class PackedLstm(nn.Module):
    """One layer of `nn.LSTM` in one direction, batch first, with the same bits: that one lays its weights out anew at
    each call, which for a few short rows takes as long as the rest. A later change of the weights is not seen."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self._hidden_size = layer.hidden_size
        self._biases = nn.ParameterList([layer.get_parameter(name) for name in ("bias_ih_l0", "bias_hh_l0")])
        weights = [layer.get_parameter(name).detach() for name in ("weight_ih_l0", "weight_hh_l0")]
        sizes = [16, PACKED_FOR_ROWS, layer.input_size]  # expected steps and rows; any others do
        self._input, self._recurrent = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(
            *weights, layer.hidden_size, False, True, False, sizes
        )

    def forward(self, x: Tensor, first: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, D), hidden and cell (1, B, H) -> y (B, T, H), hidden and cell after T."""
        y, hidden, cell, _ = torch.mkldnn_rnn_layer(
            x.transpose(0, 1).contiguous(),
            self._input,
            self._recurrent,
            self._biases[0],
            self._biases[1],
            first[0][0].contiguous(),
            first[1][0].contiguous(),
            reverse=False,
            batch_sizes=[],
            mode=LSTM_MODE,
            hidden_size=self._hidden_size,
            num_layers=1,
            has_biases=True,
            bidirectional=False,
            batch_first=False,
            train=False,
        )
        return y.transpose(0, 1), (hidden[None], cell[None])


class PackedLayer(nn.Module):
    """`nn.Linear` for inference, x (..., D) -> (..., O): a row's bits do not depend on how many there are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._linear = PackedLinear(layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def packed(module: nn.Module) -> nn.Module:
    """The same module for inference, with its linear and LSTM layers, and those without a fused kernel, on packed
    weights where that is possible, on a CPU. It shares all else with the given one, which stays as it is."""
    if isinstance(module, nn.Linear):
        return PackedLayer(module)
    if isinstance(module, nn.LSTM):
        return PackedLstm(module) if _packs(module.get_parameter("weight_ih_l0")) else module
    if isinstance(module, UnfusedLayer):
        return module.on([PackedLinear(matrix) for matrix in module.matrices()])
    twin = copy.copy(module)
    twin._modules = {name: child and packed(child) for name, child in module._modules.items()}
    return twin


LINEAR: dict[Weights, Callable[..., Linear]] = {
    "float32": PackedLinear,
    "int8": Int8Linear,
    "float16": partial(HalfLinear, dtype=torch.float16),
    "bfloat16": partial(HalfLinear, dtype=torch.bfloat16),
}


def has_vnni() -> bool:
    """Whether the CPU has dot products of 8-bit numbers that never overflow, in the form of AVX-512."""
    return torch.cpu._is_vnni_supported()


def _scale(x: Tensor) -> Tensor:
    """What each row is divided by to fit into 8 bits: (N, 1), never 0."""
    return x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(LARGEST_INT8)


def _on_gpu(weight: Tensor) -> bool:
    return weight.device.type == "cuda"


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, D), weight (D, O), both of 16 bits -> (N, O) of float32. The sums are never rounded to 16 bits, and
    there is no second copy of them, which for a large vocabulary would be the largest tensor of a step."""
    return torch.mm(x, weight, out_dtype=torch.float32)


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN is there and takes this weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
