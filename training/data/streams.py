"""Running text for language models: contiguous streams, cut into chunks, the state carried from chunk to chunk.

Truncated back-propagation through time: gradients stop at a chunk's beginning, what the model remembers does not.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from seqmodels.errors import DataError
from seqmodels.tokenizer import BOS, PAD
from training.data.batches import Batch
from training.data.encoded import Encoded
from training.data.examples import Example

SHORT_SHARE, DEVIATION = 0.05, 5.0  # of the lengths of chunks that vary
EVALUATION_ROWS = 8  # parallel streams; more is faster, and forgets at more places


class Streams:
    """All texts, one after another, as `rows` streams that are read side by side in chunks of `chunk_length` steps.

    seed: where the text begins differs from epoch to epoch, so that chunks are cut at other places. Without a seed it
    begins at the beginning. vary: whether lengths of chunks are drawn too, anew for each epoch.
    """

    carries_state = True
    padding_share = 0.0  # but for the end of the last stream

    def __init__(
        self, examples: Sequence[Example], rows: int, chunk_length: int, seed: int | None = None, vary: bool = False
    ) -> None:
        tokens = (examples if isinstance(examples, Encoded) else Encoded.of(examples)).targets
        if len(tokens) < 2:
            raise DataError("the text is empty; a language model needs at least one token to predict")
        # Each stream begins with a BOS of its own, so the first text's is left out.
        self._tokens, self._chunk, self._seed, self._vary = tokens[1:], chunk_length, seed, vary
        self._rows = max(1, min(rows, len(self._tokens) // 2))
        self._length = -(-len(self._tokens) // self._rows)  # tokens of a stream; the last may be shorter
        self._rows = -(-len(self._tokens) // self._length)  # of a short text the last would be empty

    def __len__(self) -> int:
        return -(-self._length // self._chunk)

    def batch(self, epoch: int, index: int) -> Batch:
        """labels (B, T+1): the first column is the last chunk's last."""
        first, end = self._bounds(epoch, index)
        streams = torch.arange(self._rows)[:, None] * self._length
        places = streams + torch.arange(first - 1, end)  # (B, T+1)
        labels = self._tokens[(places + self._offset(epoch)) % len(self._tokens)].long()
        labels[places >= len(self._tokens)] = PAD
        if first == 0:
            labels[:, 0] = BOS
        real = torch.full((self._rows,), labels.shape[1])
        last_row = len(self._tokens) - (self._rows - 1) * self._length + 1  # its real columns, BOS counted
        real[-1] = min(max(last_row - first, 0), labels.shape[1])
        return {"labels": labels, "label_lengths": real}

    def rate_scale(self, epoch: int, index: int) -> float:
        """A gradient is a mean over targets, so a short chunk would count for as much as a long one."""
        if not self._vary:
            return 1.0
        first, end = self._bounds(epoch, index)
        return (end - first) / self._chunk

    def _bounds(self, epoch: int, index: int) -> tuple[int, int]:
        """Where a chunk begins and ends."""
        if not self._vary:
            return index * self._chunk, min((index + 1) * self._chunk, self._length)
        ends = self._ends(epoch)
        return ends[index - 1] if index else 0, ends[index]

    @lru_cache(maxsize=2)  # noqa: B019 - one object lives as long as the run
    def _ends(self, epoch: int) -> list[int]:
        """Where each chunk of an epoch ends: lengths drawn as Merity et al. 2018 do, one in twenty about half as long,
        then stretched together so that every epoch has the same number of chunks, none of them empty."""
        draw = random.Random(f"{self._seed}:{epoch}:chunks")
        means = [self._chunk / 2 if draw.random() < SHORT_SHARE else self._chunk for _ in range(len(self))]
        lengths = [max(0.0, draw.gauss(mean, min(DEVIATION, mean / 3)) - 1) for mean in means]  # beyond one step each
        scale = (self._length - len(lengths)) / max(1.0, sum(lengths))
        ends = [number + round(end * scale) for number, end in enumerate(accumulate(lengths), start=1)]
        return [*ends[:-1], self._length]

    def _offset(self, epoch: int) -> int:
        """Where the text begins in an epoch: at which of its tokens."""
        return 0 if self._seed is None else random.Random(f"{self._seed}:{epoch}").randrange(len(self._tokens))
