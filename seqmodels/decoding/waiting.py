"""Waiting: the requests that have no rows yet, and who of them goes first.

First the higher priority; of equals, the client with the fewest rows in use; of its requests, the one with the earliest
deadline; then the first to arrive. Costs grow with the number of clients, not with that of requests.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Generic, Protocol, TypeVar

LOOK_AHEAD = 256  # requests


class Waits(Protocol):
    """The part of a request that decides its turn."""

    @property
    def id(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def client(self) -> str: ...
    @property
    def deadline(self) -> float | None: ...


R = TypeVar("R", bound=Waits)


@dataclass(frozen=True)
class Bounds:
    """Within which a step lets requests begin. share: of the rows that may be in use. needs_s: how long a long request
    takes from its turn to its end, and turn_s what one turn takes: a request takes no more turns than it may write
    tokens. Who still waits and has less time left than it needs, fails."""

    share: float = 1.0
    needs_s: float = 0.0
    turn_s: float = math.inf

    def needed_s(self, turns: int) -> float:
        """By a request of at most so many turns."""
        return min(self.needs_s, turns * self.turn_s)


UNBOUNDED = Bounds()


class Waiting(Generic[R]):
    def __init__(self) -> None:
        # By priority and client: a heap of (deadline, order of arrival, request).
        self._heaps: dict[tuple[int, str], list[tuple[float, int, R]]] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def deadlines(self) -> dict[tuple[int, str], list[float]]:
        """Of all that wait, by priority and client; infinity where there is none."""
        return {key: [deadline for deadline, _, _ in heap] for key, heap in self._heaps.items()}

    def add(self, request: R) -> None:
        deadline = math.inf if request.deadline is None else request.deadline
        heap = self._heaps.setdefault((request.priority, request.client), [])
        heapq.heappush(heap, (deadline, next(self._arrivals), request))

    def head(self, rows: Mapping[str, int]) -> R | None:
        """Who goes first, when so many rows are in use by client; None where nobody waits."""
        best = min(
            ((-priority, rows.get(client, 0), heap[0]) for (priority, client), heap in self._heaps.items()),
            key=lambda turn: (turn[0], turn[1], turn[2][:2]),
            default=None,
        )
        return best[2][2] if best else None

    def near_the_front(self, rows: Mapping[str, int]) -> Iterator[R]:
        """Some that may soon have their turn, when so many rows are in use by client: those of the highest priority and
        the fewest rows first, in no order among the requests of one client."""
        keys = sorted(self._heaps, key=lambda key: (-key[0], rows.get(key[1], 0)))
        heaps = (self._heaps[key][:LOOK_AHEAD] for key in keys)  # a heap's least come early in its list
        return (entry[2] for entry in islice(chain.from_iterable(heaps), LOOK_AHEAD))

    def take(self, request: R) -> None:
        """Remove what `head` has just named."""
        self._pop((request.priority, request.client))

    def expired(self, by: float, only: Callable[[R], bool] = lambda request: True) -> list[R]:
        """Remove and return those whose deadline has passed by then, if they are such as `only` says."""
        late: list[tuple[float, int, R]] = []
        spared: list[tuple[float, int, R]] = []
        for key in list(self._heaps):
            while key in self._heaps and self._heaps[key][0][0] <= by:
                entry = self._pop(key)
                (late if only(entry[2]) else spared).append(entry)
        for entry in spared:
            heapq.heappush(self._heaps.setdefault((entry[2].priority, entry[2].client), []), entry)
        return [request for _, _, request in late]

    def remove(self, request_id: str) -> list[R]:
        """Remove and return those of that id."""
        removed = []
        for key, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if entry[2].id != request_id]
            removed += [entry[2] for entry in heap if entry[2].id == request_id]
            if not kept:
                del self._heaps[key]
            elif len(kept) < len(heap):
                heapq.heapify(kept)
                self._heaps[key] = kept
        return removed

    def _pop(self, key: tuple[int, str]) -> tuple[float, int, R]:
        heap = self._heaps[key]
        entry = heapq.heappop(heap)
        if not heap:
            del self._heaps[key]
        return entry
