"""Padding: the shapes that a request's numbers are computed in, functions of the request alone.

They are few, so that requests meet in the same batch; and none is so small that a CPU's kernels take another path.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")

ROW_FLOOR = 4  # with fewer rows CPU kernels take another path, and a row gets other bits
BUCKETS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # padded lengths of what an encoder reads
# Padded lengths of what attention looks at: few, because a lane costs more per step than padding does. Over 12, from
# where on the masked product of a CPU gives the same bits for every padding.
LANES = (32, 128, 512, 1024)
NUMBERS = 256  # of a picture, that cost as much as a position: 588 in all of one of 3 x 224 x 224
SHORTLISTS = (512, 1024)  # padded lengths of shortlists: few, for the same reason


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
    """The padded length for an input: the next of the sizes, or the next multiple of the last one."""
    for size in sizes:
        if length <= size:
            return size
    return -(-length // sizes[-1]) * sizes[-1]


def padded_length(inputs: Tensor | None, sizes: Sequence[int] = BUCKETS) -> int:
    """Positions of one request's inputs, padding included; 1 of an image, 0 of nothing."""
    if inputs is None:
        return 0
    return bucket(len(inputs), sizes) if has_steps(inputs) else 1


def reading_cost(inputs: Tensor | None) -> int:
    """What it takes to read one request's inputs, in positions: as many as they have, and more of pictures, of which a
    large backbone takes a second for a dozen."""
    length = padded_length(inputs)
    return max(length, inputs.numel() // NUMBERS) if inputs is not None and inputs.dim() > 2 else length


def has_steps(inputs: Tensor) -> bool:
    """Whether axis 0 of one request's inputs is time: token ids, features and frames, but not an image (C, H, W)."""
    return inputs.dim() != 3


def pad_inputs(inputs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Inputs of one bucket -> (B, S, ...) padded with zeros to the bucket's length, and lengths (B,)."""
    if not has_steps(inputs[0]):
        return torch.stack(list(inputs)).to(device), None
    lengths = [len(one) for one in inputs]
    as_long_as_all = inputs[0].new_empty(bucket(max(lengths)), *inputs[0].shape[1:])
    padded = pad_sequence([*inputs, as_long_as_all], batch_first=True)[:-1]
    return padded.to(device), torch.tensor(lengths, device=device)


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items with equal keys together, groups in order of the key, order kept within each."""
    return [list(group) for _, group in groupby(sorted(items, key=key), key=key)]
