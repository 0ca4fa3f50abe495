"""Encoded: examples that are whole numbers throughout, in flat arrays that may stay on the disk until they are read.

    encoded.safetensors   inputs, targets                 token ids or labels of all examples, one after another, int32
                          input_lengths, target_lengths   of each Example, int64
                          target_sizes                    numbers in its targets, -1 for a label alone, int64
                          metadata: source, what it was made from; sha256, of all arrays

A run writes the file before step 0 and maps it into memory, so neither it nor a run that goes on holds its data as
Python objects, or encodes it again. The file can always be made anew: one that is damaged or foreign is just absent.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqmodels.config import ModelConfig
from training.checkpoint import writing_whole
from training.data.examples import Example

ENCODED = "encoded.safetensors"
Array = np.ndarray[tuple[int], np.dtype[np.signedinteger]]
ALONE = -1  # the size of a target that is one label, not a list of them


class Encoded(Sequence[Example]):
    """The examples that it was made of, equal in every number."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self._arrays = arrays
        self.targets = arrays["targets"]  # of all examples, one after another: int32 (N,)
        self.lengths = arrays["input_lengths"].numpy(), arrays["target_lengths"].numpy()
        self._target_sizes = arrays["target_sizes"].numpy()
        self._input_ends, self._target_ends = self.lengths[0].cumsum(), np.abs(self._target_sizes).cumsum()

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Encoded":
        """Takes them one by one, so they need never stand side by side as Python objects."""
        inputs, targets = array("i"), array("i")
        input_lengths, target_lengths, target_sizes = array("q"), array("q"), array("q")
        for example in examples:
            alone = isinstance(example.targets, int)
            inputs.extend(example.inputs or ())
            targets.extend([example.targets] if alone else example.targets)
            input_lengths.append(example.input_length)
            target_lengths.append(example.target_length)
            target_sizes.append(ALONE if alone else len(example.targets))
        return cls(
            {
                "inputs": _tensor(inputs),
                "targets": _tensor(targets),
                "input_lengths": _tensor(input_lengths),
                "target_lengths": _tensor(target_lengths),
                "target_sizes": _tensor(target_sizes),
            }
        )

    def save(self, path: Path, source: str) -> None:
        """Write the file; it is whole or absent."""
        with writing_whole(path) as temporary:
            save_file(self._arrays, temporary, {"source": source, "sha256": _sha256(self._arrays)})

    @classmethod
    def load(cls, path: Path, source: str) -> "Encoded | None":
        """Mapped from a file, not read; None where there is no whole one that was made from the same source."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            arrays = load_file(path)
        except (OSError, SafetensorError):
            return None
        if metadata != {"source": source, "sha256": _sha256(arrays)}:
            return None
        return cls(arrays)

    def __len__(self) -> int:
        return len(self._target_sizes)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        inputs = _part(self._arrays["inputs"].numpy(), self._input_ends, number)
        targets = _part(self.targets.numpy(), self._target_ends, number)
        alone = self._target_sizes[number] == ALONE
        input_length, target_length = (int(lengths[number]) for lengths in self.lengths)
        return Example(inputs or None, targets[0] if alone else targets, input_length, target_length)


def is_encodable(config: ModelConfig) -> bool:
    """Whether a model's examples are whole numbers throughout: texts without spellings, and what is no regression."""
    texts = config.input in ("text", "nothing") and config.characters is None
    return texts and config.problem_type != "regression"


def _part(numbers: Array, ends: Array, place: int) -> list[int]:
    """What stands at a place, where all stand one after another."""
    first = ends[place - 1] if place else 0
    part: list[int] = numbers[first : ends[place]].tolist()
    return part


def _tensor(numbers: "array[int]") -> Tensor:
    dtype = torch.int32 if numbers.typecode == "i" else torch.int64
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _sha256(arrays: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(arrays.items()):
        digest.update(f"{name} {tensor.dtype} {len(tensor)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
