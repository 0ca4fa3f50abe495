"""Sources: what requests give to read, encoded in batches of their own, some ahead of their turn.

An encoder's call takes little longer for a few sources than for one, so those of requests that still wait are read
along with those whose turn it is. Knows inputs, memories and start states; knows no search.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from seqmodels.decoding.padding import LANES, grouped, pad_inputs, padded_length, reading_cost
from seqmodels.decoding.request import Request
from seqmodels.state import State
from seqmodels.stepper import Decodes

# What a call is filled up to. On one CPU thread, an LSTM of 2 x 256 reads 4 sources of 16 tokens in 3 ms and 16 in 6.
ROWS, POSITIONS = 16, 512
# Of what waits encoded: enough to fill most calls, though lengths are mixed, and at 512 features 64 MiB.
MAX_AHEAD, MAX_POSITIONS_AHEAD = 256, 16_384


@dataclass(frozen=True)
class Encoded:
    """One source: its memory, as long as its lane's, None where no step looks at it; and the state that its search
    starts from. A row each."""

    memory: Any
    state: State

    def copied(self) -> "Encoded":
        row = torch.zeros(1, dtype=torch.int64, device=self.state.values.device)
        return Encoded(self.memory and self.memory.select(row), self.state.select(row))


class Sources:
    """Encodes for one model."""

    def __init__(self, model: Decodes, row_floor: int) -> None:
        self._model = model
        self._row_floor = row_floor
        self._ahead: dict[Request, Encoded] = {}

    def __len__(self) -> int:
        """How many were read ahead of their turn, and wait."""
        return len(self._ahead)

    def encode(self, requests: Sequence[Request], waiting: Iterable[Request], positions: int) -> list[Encoded]:
        """Of requests whose turn it is. waiting: others, which are read along with those of the same padded length;
        positions: how many these may have together."""
        waiting = list(waiting)
        try:
            for group in grouped([r for r in requests if r not in self._ahead], _length):
                alone = len(group)
                if cost := reading_cost(group[0].inputs):
                    room = min(ROWS, POSITIONS // cost) - alone
                    room = min(room, positions // cost, self._room(group[0]))
                    alike = (other for other in waiting if _alike(other, group[0]) and other not in self._ahead)
                    group += islice(alike, max(0, room))
                    positions -= (len(group) - alone) * cost
                encoded = self._encode(group)
                waits = [
                    one.copied() for one in encoded[alone:]
                ]  # no views, which would keep all the call's rows alive
                self._ahead.update(zip(group, encoded[:alone] + waits, strict=True))
        except BaseException:  # nobody asks again for what was read before that
            self.forget(requests)
            raise
        return [self._ahead.pop(request) for request in requests]

    def _room(self, request: Request) -> int:
        """How many more of that length may wait encoded."""
        held = sum(map(_looked_at, self._ahead))
        return min(MAX_AHEAD - len(self), (MAX_POSITIONS_AHEAD - held) // _looked_at(request))

    def forget(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._ahead.pop(request, None)

    def _encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """Rows are padded to the floor with copies of the first, so that none gets other bits when it comes alone."""
        padded = [*requests, *[requests[0]] * (self._row_floor - len(requests))]
        inputs = [request.inputs for request in padded if request.inputs is not None]
        if not inputs:  # one object, by which prompts that begin alike know each other
            return [Encoded(None, self._model.start(None, 1))] * len(requests)
        memory = self._model.encode(*pad_inputs(inputs, self._model.device))
        states = self._model.start(memory, len(padded)).split()[: len(requests)]
        if not self._model.attends:
            return [Encoded(None, state) for state in states]
        memories = memory.padded(_looked_at(requests[0])).split()[: len(requests)]
        return [Encoded(*row) for row in zip(memories, states, strict=True)]


def _length(request: Request) -> int:
    return padded_length(request.inputs)


def _alike(one: Request, other: Request) -> bool:
    return _length(one) == _length(other)


def _looked_at(request: Request) -> int:
    """Positions of its memory once it is as long as its lane's."""
    return padded_length(request.inputs, LANES)
