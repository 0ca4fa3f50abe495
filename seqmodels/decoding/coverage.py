"""Coverage: how much of the source hypotheses have looked at, and what one that left some out pays for it.

R requests, K hypotheses each, S source positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmodels.decoding.params import SearchParams
from seqmodels.record import Record

LEAST_ATTENTION = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Coverage(Record):
    """How much attention each hypothesis has paid to each source position, over its generated tokens."""

    attended: Tensor  # (R, K, S)
    mask: Tensor  # (R, S) the source's real positions
    beta: Tensor  # (R,) coverage_penalty

    @classmethod
    def begin(cls, params: Sequence[SearchParams], mask: Tensor | None) -> "Coverage | None":
        """For requests of one lane, who all ask for it or none does. mask: the memory's."""
        if not params[0].coverage_penalty or mask is None:
            return None
        beta = torch.tensor([p.coverage_penalty for p in params], dtype=torch.float64)
        return cls(torch.zeros(len(params), params[0].width, mask.shape[1]), mask, beta)

    def after(self, weights: Tensor) -> "Coverage":
        """With the attention (R, K, S) that the rows pay at this step."""
        return self.changed(attended=self.attended + weights)

    def moved(self, parents: Tensor) -> "Coverage":
        """Each hypothesis in the place of the one that it continues: parents (R, K)."""
        return self.changed(attended=self.attended.gather(1, parents[:, :, None].expand_as(self.attended)))

    def penalty(self) -> Tensor:
        """What each hypothesis's score loses if it ends here (R, K), at most 0: Wu et al. 2016, equation 14.

        A position whose attention underflowed counts as the least float, which costs much but leaves a number.
        """
        # In float64, for a sum of many logs, whose last digits nobody should see.
        covered = self.attended.double().clamp(LEAST_ATTENTION, 1.0).masked_fill(~self.mask[:, None], 1.0)
        return (self.beta[:, None] * covered.log().sum(2)).float()
