"""Examples -> batches of tensors, bucketed by length, in an order that is a pure function of (seed, epoch, step).

Rows of nearly the same length share a batch, within a budget of padded positions. Which rows these are, and the order
of the batches, change from epoch to epoch; the number of batches never does, so a schedule knows where it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from seqmodels.errors import DataError
from seqmodels.losses import IGNORE
from seqmodels.tokenizer import PAD
from training.config import AugmentationSection
from training.data.augment import augmented
from training.data.encoded import Encoded
from training.data.examples import Codec, Example
from training.data.subwords import SubwordDropout

Batch = dict[str, Any]
Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]


class Batches(Protocol):
    """What the loop asks for its data."""

    carries_state: bool  # whether a batch goes on where the one before it ended

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    @property
    def padding_share(self) -> float:
        """How much of an epoch's positions is padding."""
        ...

    def batch(self, epoch: int, index: int) -> Batch:
        """The tensors for `model(**batch)`."""
        ...

    def rate_scale(self, epoch: int, index: int) -> float:
        """What the learning rate is multiplied by for this batch; 1 unless it is shorter or longer than meant."""
        ...


@dataclass(frozen=True)
class Epoch:
    """batches: the examples of each, by number."""

    number: int
    examples: Sequence[Example]
    batches: list[list[int]]


class Buckets:
    """Batches of independent examples."""

    carries_state = False

    def __init__(
        self,
        examples: Sequence[Example],
        codec: Codec,
        tokens_per_batch: int,
        rows_per_batch: int,
        seed: int,
        with_references: bool = False,
        augmentation: AugmentationSection | None = None,
        tokenizer_dropout: float = 0.0,
    ) -> None:
        """with_references: whether a batch holds each example's, for what is learned from them all. augmentation: of
        pictures, by draws that are a function of (seed, epoch, example). tokenizer_dropout: of texts, by draws that
        are a function of (seed, epoch); the budget counts positions without it."""
        if not examples:
            writes = codec.config.architecture == "generator"
            raise DataError(f"no row fits; raise data.max_input_length{' or data.max_target_length' if writes else ''}")
        self._examples, self._codec, self._seed = examples, codec, seed
        self._with_references, self._augmentation = with_references, augmentation
        self._dropout = SubwordDropout(codec, tokenizer_dropout, seed) if tokenizer_dropout else None
        # Without dropout sorted lengths are the same in every epoch, and so are the places where batches begin and end.
        inputs, targets = self._sorted_by(examples)
        order = np.lexsort((inputs, targets))
        sizes = list(zip(inputs[order].tolist(), targets[order].tolist(), strict=True))
        self._bounds = _bounds(sizes, tokens_per_batch, rows_per_batch)
        self._epoch: Epoch | None = None

    def __len__(self) -> int:
        return len(self._bounds)

    def batch(self, epoch: int, index: int) -> Batch:
        now = self.epoch(epoch)
        rows = now.batches[index]
        examples = [now.examples[row] for row in rows]
        batch = collate(examples, self._codec)
        if self._augmentation:
            draws = (np.random.default_rng([self._seed, epoch, row]) for row in rows)
            pictures = zip(batch["inputs"], draws, strict=True)
            batch["inputs"] = torch.stack([augmented(one, self._augmentation, draw) for one, draw in pictures])
        if self._with_references:
            batch["references"] = [example.references for example in examples]
        return batch

    def rate_scale(self, epoch: int, index: int) -> float:
        return 1.0

    @property
    def padding_share(self) -> float:
        """The share of positions in all batches of the first epoch that are padding."""
        first = self.epoch(0)
        sizes = lengths_of(first.examples)
        real = sum(int(lengths.sum()) for lengths in sizes)
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in first.batches for lengths in sizes)
        return 1 - real / padded

    def epoch(self, number: int) -> Epoch:
        """The last one that was asked for is kept."""
        if self._epoch is None or self._epoch.number != number:
            random = np.random.default_rng([self._seed, number])
            examples = self._dropout(self._examples, number) if self._dropout else self._examples
            inputs, targets = self._sorted_by(examples)
            shuffled = random.permutation(len(examples))
            order = shuffled[np.lexsort((inputs[shuffled], targets[shuffled]))]
            batches = [order[first:last].tolist() for first, last in self._bounds]
            self._epoch = Epoch(number, examples, [batches[place] for place in random.permutation(len(batches))])
        return self._epoch

    def _sorted_by(self, examples: Sequence[Example]) -> tuple[Lengths, Lengths]:
        """The lengths, (E,) each, that examples of one batch are to share."""
        inputs, targets = lengths_of(examples)
        if self._codec.config.input == "image" and self._codec.grids is None:
            # Captions of one length show pictures of one kind, and batch normalisation must see all kinds together.
            targets = np.full_like(targets, targets.max())
        return inputs, targets


def collate(examples: Sequence[Example], codec: Codec) -> Batch:
    """Pad to the longest. Keys and shapes are those of `model(**batch)`, see seqmodels.models."""
    batch: Batch = {}
    if codec.config.input != "nothing":
        batch["inputs"] = _inputs(examples, codec)
    if codec.config.input not in ("nothing", "image"):
        batch["lengths"] = torch.tensor([example.input_length for example in examples])
    if codec.config.architecture == "classifier":
        batch["labels"] = torch.tensor([example.targets for example in examples])  # numbers in float32
    elif codec.config.architecture == "tagger":
        batch["labels"] = _padded([torch.tensor(example.targets) for example in examples], IGNORE)
    else:
        batch["labels"] = _padded([torch.tensor(example.targets) for example in examples], PAD)
        batch["label_lengths"] = torch.tensor([example.target_length for example in examples])
    return batch


def lengths_of(examples: Sequence[Example]) -> tuple[Lengths, Lengths]:
    """Of the inputs and of the targets, (E,) each."""
    if isinstance(examples, Encoded):
        return examples.lengths
    sizes = [(example.input_length, example.target_length) for example in examples]
    inputs, targets = np.array(sizes).T
    return inputs, targets


def _inputs(examples: Sequence[Example], codec: Codec) -> Tensor:
    if codec.config.input == "image":
        return torch.stack([codec.decode_picture(example.inputs) for example in examples])  # (B, C, H, W)
    if codec.config.input == "frames":  # (B, S, C, H, W)
        return _padded([torch.stack([codec.decode_picture(f) for f in example.inputs]) for example in examples], 0)
    dtype = torch.int64 if codec.config.input == "text" else torch.float32
    return _padded([torch.as_tensor(example.inputs, dtype=dtype) for example in examples], PAD)


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Rows (T_b, ...) -> (B, max T_b, ...)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _bounds(sizes: Sequence[tuple[int, int]], tokens: int, rows: int) -> list[tuple[int, int]]:
    """(first, last) of each batch over sorted (input, target) lengths; a single row may exceed the budget."""
    bounds, first, longest_input, longest_target = [], 0, 0, 0
    for place, (input_length, target_length) in enumerate(sizes):
        longest_input, longest_target = max(longest_input, input_length), max(longest_target, target_length)
        count = place - first + 1
        if count > 1 and (count > rows or count * (longest_input + longest_target) > tokens):
            bounds.append((first, place))
            first, longest_input, longest_target = place, input_length, target_length
    return [*bounds, (first, len(sizes))]
