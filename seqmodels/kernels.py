"""Linear maps whose weights are laid out once for the processor: what a decoder's step spends its time in.

Knows one product and how each device computes it fastest; docs/performance.md says what was measured.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.config import Weights
from seqmodels.errors import ConfigError

Linear = Callable[[Tensor], Tensor]  # x (N, D) -> x W^T + b (N, O)

LARGEST_INT8 = 127
PACKED_FOR_ROWS = 32  # oneDNN chooses a layout by the number of rows it expects; measured the same from 4 to 160


class PackedLinear:
    """y = x W^T + b for rows x (N, D), W (O, D), b (O,) or None: y (N, O).

    On a CPU with oneDNN the weight is reordered once into the blocks that its kernels read; `F.linear` goes through
    another library, two to four times slower for the few rows of a step on the machines measured, and gives other
    last bits to 1 to 3 rows. A later change of the given weight may not be seen.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class Int8Linear:
    """The same in whole numbers: weights with a scale per output, inputs with a scale per row.

    Several times as fast as float32 on a CPU with 8-bit dot products; docs/performance.md says what it costs in BLEU. A
    scale per row, not per batch, and sums of whole numbers keep a row's bits independent of its neighbours.
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

    def __call__(self, x: Tensor) -> Tensor:
        scale = _scale(x)
        whole = (x / scale).round_().to(torch.int8)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, self._weight, self._scale, self._no_offset, None, 1.0, 0, torch.float32, "none", [], ""
        )  # already times the outputs' scales
        return torch.addcmul(self._bias, products, scale, out=products)


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

    def __call__(self, x: Tensor) -> Tensor:
        y = _float32_product(x.to(self._weight.dtype), self._weight)
        return y if self._bias is None else y.add_(self._bias)


LINEAR: dict[Weights, Callable[..., Linear]] = {
    "float32": PackedLinear,
    "int8": Int8Linear,
    "float16": partial(HalfLinear, dtype=torch.float16),
    "bfloat16": partial(HalfLinear, dtype=torch.bfloat16),
}


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
