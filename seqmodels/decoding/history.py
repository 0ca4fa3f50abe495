"""History: what the hypotheses of a lane have written so far, as rules and constraints look at it."""

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -1  # a token id that no history holds
BEFORE = -2  # stands in a history where nothing has been written yet


@dataclass(frozen=True)
class History:
    """What each hypothesis has written: tokens (R, K, M), of which the first `written` (R,) count, prefix included.

    generated: (R,), those of them that came after the prefix.
    """

    tokens: Tensor
    written: Tensor
    generated: Tensor

    def select(self, requests: Tensor) -> "History":
        return History(self.tokens[requests], self.written[requests], self.generated[requests])

    def tail(self, count: int) -> Tensor:
        """The last `count` tokens of each hypothesis (R, K, count), BEFORE where it is shorter."""
        positions = self.written[:, None] + torch.arange(-count, 0, device=self.tokens.device)  # (R, count)
        index = positions.clamp(min=0)[:, None].expand(-1, self.tokens.shape[1], -1)
        return self.tokens.gather(2, index).masked_fill((positions < 0)[:, None], BEFORE)
