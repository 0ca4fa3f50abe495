"""Randomness as a pure function of (seed, output index, step, token).

A counter-based hash on tensors in place of generator objects: a draw does not depend on who shares the batch, on the
order of arrival or on what was drawn before, and a resumed generation goes on exactly.
"""

import torch
from torch import Tensor

# splitmix64 (Steele et al. 2014), written as signed 64-bit numbers because torch wraps those on overflow
_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def gumbel(seeds: Tensor, outputs: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (R, K, V) of float32: the arg-max of log-probabilities plus noise is a fair draw.

    seeds: (R,) of int64; outputs: (R, K), the index of each; steps: (R,), tokens generated so far.
    """
    device = seeds.device
    key = _mix(_mix(seeds)[:, None] + outputs)  # (R, K)
    key = _mix(key + steps[:, None])
    bits = _mix(key[:, :, None] + torch.arange(vocab_size, device=device))  # (R, K, V)
    # 23 bits and a half: every value is exact in float32, so it is never 0 or 1 and the noise is finite.
    uniform = (_shift(bits, 41).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros: torch's own shift of a signed number copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
