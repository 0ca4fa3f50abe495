"""Packed weights against `F.linear`, and what a row's bits depend on."""

import pytest
import torch
from torch.nn import functional as F

from seqmodels.kernels import PackedLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2048), (512, 7700), (33, 5), (1, 1)])
def test_packed_equals_linear(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
    packed, x = PackedLinear(weight, offset), torch.randn(7, inputs)
    assert torch.allclose(packed(x), F.linear(x, weight, offset), atol=1e-5 * inputs**0.5, rtol=1e-4)
