"""State and Memory: the two things that stand between an encoder, a decoder and a search.

State is what a recurrence carries from step to step. Memory is what a decoder may look at. In both, axis 0 is the
row, so reorder, retire, admit and repeat are one operation: `select`. Knows tensors; knows no cell and no layer.

Legend for every docstring of this package: B rows, T steps, S source positions, H hidden, D features, V vocabulary,
R requests, K beams, N all live decoder rows, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.record import Record


@dataclass(frozen=True)
class State:
    """What a recurrence carries: one contiguous float tensor, a row per sequence.

    values: (B, width). Columns belong to whoever made the state; `Recurrent` knows its own layout.
    """

    values: Tensor

    @property
    def num_rows(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def select(self, rows: Tensor) -> "State":
        """The given rows, in the given order, repeats allowed. rows: (M,) of int64."""
        return State(self.values.index_select(0, rows))

    def split(self) -> "list[State]":
        """Each row alone, in a view of this state."""
        return [State(row) for row in torch.split(self.values, 1)]

    def concat(self, other: "State") -> "State":
        """Rows of this state, then rows of the other."""
        return State(torch.cat([self.values, other.values]))

    def detach(self) -> "State":
        return State(self.values.detach())

    def float(self) -> "State":
        return State(self.values.float())

    def to(self, device: torch.device) -> "State":
        return State(self.values.to(device))

    def to_bytes(self) -> bytes:
        """Little-endian float32, row after row."""
        return self.values.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, width: int) -> "State":
        return cls(torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, width))


@dataclass(frozen=True)
class Memory(Record):
    """What a decoder may look at.

    values: (B, S, D). mask: (B, S), true at real positions; every row has at least one. summary: (B, D'), one vector
    a row, from which a decoder starts. From a decoder's attention, once it has prepared the memory (None before that):
    keys: (B, S, H), what queries are compared with; bias: (B, 1, S), which it adds to scores, -inf at padding.
    """

    values: Tensor
    mask: Tensor
    summary: Tensor
    keys: Tensor | None = None
    bias: Tensor | None = None

    def split(self) -> "list[Memory]":
        """Each row alone, in a view of this memory."""
        return [self._each(lambda x, row=row: x[row : row + 1]) for row in range(len(self.values))]

    def concat(self, *others: "Memory") -> "Memory":
        """Rows of this memory, then rows of the others; S grows to the longest, and what is filled up is masked."""
        everyone = (self, *others)
        positions = max(one.values.shape[1] for one in everyone)
        first, *rest = (one.padded(positions) for one in everyone)
        return Record.concat(first, *rest)

    def put(self, places: Tensor, other: "Memory") -> "Memory":
        """See Record. S grows to the other's where that is longer."""
        positions = max(self.values.shape[1], other.values.shape[1])
        return Record.put(self.padded(positions), places, other.padded(positions))

    def padded(self, positions: int) -> "Memory":
        """The same with S filled up to so many positions, which are masked; unchanged where S is as large."""
        missing = positions - self.values.shape[1]
        if missing <= 0:
            return self
        return self.changed(
            values=F.pad(self.values, (0, 0, 0, missing)),
            mask=F.pad(self.mask, (0, missing), value=False),
            keys=None if self.keys is None else F.pad(self.keys, (0, 0, 0, missing)),
            bias=None if self.bias is None else F.pad(self.bias, (0, missing), value=float("-inf")),
        )


@dataclass(frozen=True)
class MemoryGroup:
    """The memories that several models have made of the same inputs: rows stand alike in all of them."""

    members: tuple[Memory, ...]

    @property
    def mask(self) -> Tensor:
        """(B, S), where the members' positions are the same."""
        return self.members[0].mask

    def select(self, rows: Tensor) -> "MemoryGroup":
        return MemoryGroup(tuple(memory.select(rows) for memory in self.members))

    def split(self) -> "list[MemoryGroup]":
        return [MemoryGroup(row) for row in zip(*(memory.split() for memory in self.members), strict=True)]

    def concat(self, *others: "MemoryGroup") -> "MemoryGroup":
        columns = zip(self.members, *(other.members for other in others), strict=True)
        return MemoryGroup(tuple(first.concat(*rest) for first, *rest in columns))

    def put(self, rows: Tensor, other: "MemoryGroup") -> "MemoryGroup":
        return MemoryGroup(tuple(one.put(rows, two) for one, two in zip(self.members, other.members, strict=True)))

    def padded(self, positions: int) -> "MemoryGroup":
        return MemoryGroup(tuple(memory.padded(positions) for memory in self.members))
