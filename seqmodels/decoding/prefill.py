"""Prefill: tokens that are given, a prompt or a forced prefix, read a few each turn, and each shared beginning once.

Knows tokens and states; knows no request and no search. A state is a function of the tokens before it, and of the
memory where it has one, whatever the turns and the company in which they were read, so a beginning that was read before
without a memory may be taken from a cache.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from seqmodels.decoding.padding import grouped
from seqmodels.state import State
from seqmodels.stepper import Decodes, Group

# Of one turn. An LSTM of 512 on one CPU thread reads 8 tokens of one prompt in 2.6 ms, of 32 in 6 ms; one step of the
# search takes 1 ms for 4 rows and 10 ms for 160. So prompts of any length cost those that run a few steps at most.
TOKENS, ROWS = 8, 32
BLOCK = 32  # tokens between two states that the cache keeps; a multiple of TOKENS


@dataclass(eq=False)
class Unread:
    """What one row has to read. state: one row, after the first `position` of its tokens.

    shared: whether the state is a function of the tokens alone, so that whoever begins alike may have it. memory: a row
    of one, where the state depends on that.
    """

    tokens: tuple[int, ...]
    state: State
    position: int = 0
    shared: bool = False
    memory: Any = None

    @property
    def num_looked_at(self) -> int:
        """Positions of the memory."""
        return self.memory.mask.shape[1] if self.memory else 0

    @property
    def done(self) -> bool:
        return self.position == len(self.tokens)


class Prefill:
    """Reads for the rows of one model. tokens_read counts the tokens that rows have read, tokens_saved those that they
    did not have to, since another row had."""

    def __init__(self, model: Decodes, row_floor: int, cache_states: int) -> None:
        """cache_states: how many states to keep of what was read before; 0 shares nothing."""
        self._model = model
        self._row_floor = row_floor
        self._cache = StateCache(cache_states) if cache_states else None
        self.tokens_read = self.tokens_saved = 0

    def read(self, waiting: Sequence[Unread]) -> None:
        """A few tokens more for the first of those that wait."""
        turn: dict[object, list[Unread]] = {}  # rows that stand at the same place and read the same go together
        for unread in waiting:
            if len(turn) == ROWS:
                break
            shared = unread.shared and self._cache is not None
            if shared and unread.position == 0:
                self._look_up(unread)
            if not unread.done:
                # Who has the same state has read the same tokens, so it is enough to compare the next ones.
                ahead = unread.tokens[unread.position : _end(unread)]
                turn.setdefault((id(unread.state), ahead) if shared else id(unread), []).append(unread)
        if turn:
            self._read(list(turn.values()))

    def _look_up(self, unread: Unread) -> None:
        assert self._cache is not None
        if found := self._cache.longest(unread.tokens):
            unread.position, unread.state = found
            self.tokens_saved += unread.position

    def _read(self, alike: Sequence[Sequence[Unread]]) -> None:
        """One row for those that are alike. Rows are padded to the floor, so that none gets other bits when alone."""
        device = self._model.device
        # Memories of one length stand together: the shapes that a row sees do not depend on its company.
        alike = [group for lane in grouped(alike, lambda group: group[0].num_looked_at) for group in lane]
        firsts = [group[0] for group in alike]
        groups = _groups(firsts) if self._model.reads_memory else ()
        firsts += firsts[:1] * (self._row_floor - len(firsts))
        tokens = [torch.tensor(one.tokens[one.position : _end(one)], dtype=torch.int64) for one in firsts]
        lengths = torch.tensor([len(row) for row in tokens], device=device)
        before = State(torch.cat([one.state.values for one in firsts]))
        after = self._model.read(pad_sequence(tokens, batch_first=True).to(device), lengths, before, groups)
        for row, group in enumerate(alike):
            count = len(tokens[row])
            self.tokens_read += count
            self.tokens_saved += count * (len(group) - 1)
            state = State(after.values[row : row + 1].clone())  # no view, which would keep all the rows alive
            for unread in group:
                unread.state, unread.position = state, unread.position + count
            self._keep(group[0])

    def _keep(self, unread: Unread) -> None:
        if self._cache is not None and unread.shared and (unread.done or unread.position % BLOCK == 0):
            self._cache.put(unread.tokens[: unread.position], unread.state)


class StateCache:
    """States by the tokens that led to them: at every BLOCK tokens and at the end of each prompt. The one that was not
    asked for the longest makes way."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._states: OrderedDict[tuple[int, ...], State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def put(self, tokens: tuple[int, ...], state: State) -> None:
        self._states[tokens] = state
        self._states.move_to_end(tokens)
        if len(self) > self._size:
            self._states.popitem(last=False)

    def longest(self, tokens: tuple[int, ...]) -> tuple[int, State] | None:
        """All of them, or else the longest beginning of whole BLOCKs, that has a state here: how many tokens, and the
        state after them."""
        last = (len(tokens) - 1) // BLOCK * BLOCK
        for length in (len(tokens), *range(last, 0, -BLOCK)):
            if state := self._states.get(tokens[:length]):
                self._states.move_to_end(tokens[:length])
                return length, state
        return None


def _end(unread: Unread) -> int:
    """Where it will stand after this turn."""
    return min(unread.position + TOKENS, len(unread.tokens))


def _groups(rows: Sequence[Unread]) -> list[Group]:
    """Of rows in the order of their memories' lengths."""
    lanes = grouped(rows, lambda row: row.num_looked_at)
    return [Group(len(lane), 1, lane[0].memory.concat(*(row.memory for row in lane[1:]))) for lane in lanes]
