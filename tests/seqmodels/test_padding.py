"""Padding: inputs in a batch stand at their beginnings, and its length is that of their bucket, not of the longest."""

import pytest
import torch
from torch import Tensor

from seqmodels.decoding.padding import pad_inputs


@pytest.mark.parametrize("inputs", [[torch.arange(1, 4), torch.arange(5, 18)], [torch.ones(13, 2), torch.ones(3, 2)]])
def test_inputs_are_padded_with_zeros_to_their_bucket(inputs: list[Tensor]) -> None:
    padded, lengths = pad_inputs(inputs, torch.device("cpu"))
    assert padded.shape == (2, 16, *inputs[0].shape[1:]) and padded.dtype == inputs[0].dtype
    assert lengths is not None and lengths.tolist() == [len(one) for one in inputs]
    for row, one in zip(padded, inputs, strict=True):
        assert torch.equal(row[: len(one)], one) and not row[len(one) :].any()


def test_pictures_are_not_padded() -> None:
    pictures = [torch.rand(3, 4, 5), torch.rand(3, 4, 5)]
    padded, lengths = pad_inputs(pictures, torch.device("cpu"))
    assert torch.equal(padded, torch.stack(pictures)) and lengths is None
