"""Workers: the processes that train one model together, each on its own rows of every batch.

They speak through torch's process group, which whoever starts them has made; a worker alone speaks to nobody, so that
nothing here changes what it does. Knows tensors and rows; knows no model, no loop and no Ray.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from training.data.batches import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """All of them, as one of them sees it. rank: its own number, from 0. size: how many there are.

    Every method but `seed` and `share` is called by all workers at the same place, each with what it has itself.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that logs, validates and saves."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Of this worker's random numbers: the first draws those of a worker alone, each other its own."""
        if self.is_first:
            return seed
        return random.Random(f"{seed}:{self.rank}").getrandbits(63)

    def share(self, batch: Batch) -> Batch | None:
        """This worker's rows of a batch, None where it has none. The same rows of every batch of as many."""
        if self.size == 1:
            return batch
        rows = len(batch["labels"])
        first, end = self.rank * rows // self.size, (self.rank + 1) * rows // self.size
        if first == end:
            return None
        return {name: value[first:end] for name, value in batch.items()}

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Each number's sum over all workers, in float64."""
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes its sum over all workers; one that no worker has stays None."""
        if self.size == 1:
            return
        parameters = list(parameters)
        held = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        distributed.all_reduce(held)
        moved = [parameter for parameter, holders in zip(parameters, held.tolist(), strict=True) if holders]
        for parameter in moved:
            if parameter.grad is None:  # this worker has no rows of the batch
                parameter.grad = torch.zeros_like(parameter)
        self._together(distributed.all_reduce, [parameter.grad for parameter in moved if parameter.grad is not None])

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with the first worker's."""
        if self.size > 1:
            self._together(lambda flat: distributed.broadcast(flat, src=0), list(tensors))

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, for all; the others wait for it."""
        if self.size == 1:
            return make()
        made = [make() if self.is_first else None]
        distributed.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def gather(self, mine: T) -> list[T]:
        """What each worker has, by rank."""
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        distributed.all_gather_object(everyone, mine)
        return everyone

    def _together(self, operation: Callable[[Tensor], object], tensors: list[Tensor]) -> None:
        """One operation in place of many: a message costs more than a copy."""
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        operation(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Workers()
