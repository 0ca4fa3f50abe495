"""Record: tensors of a lane's requests, which join and leave together."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Record:
    """Fields are tensors with the request on axis 0, records of the same requests, or None. Axis 2 of a tensor, where
    there is one, is a position in what is written."""

    def select(self, requests: Tensor) -> Self:
        """Some requests, in the given order."""
        return self._each(lambda x: x.select(requests) if isinstance(x, Record) else x.index_select(0, requests))

    def trimmed(self, room: int) -> Self:
        """Tables cut to `room` positions, since each step may gather all that they hold."""
        return self._each(lambda x: x.trimmed(room) if isinstance(x, Record) else x[:, :, :room] if x.dim() > 2 else x)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda x: x.to(device))

    def concat(self, other: Self) -> Self:
        """These requests, then the other's; room for positions grows to the larger of the two."""
        names = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        return replace(self, **{name: _concat(getattr(self, name), getattr(other, name)) for name in names})

    def put(self, places: Tensor, other: Self) -> Self:
        """The same with the other's requests in some places (R',). Written in place, where there is room."""
        names = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        return replace(self, **{name: _put(getattr(self, name), places, getattr(other, name)) for name in names})

    def _each(self, change: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


def _concat(one: Any, two: Any) -> Any:
    return one.concat(two) if isinstance(one, Record) else torch.cat(_alike(one, two))


def _put(one: Any, places: Tensor, two: Any) -> Any:
    if isinstance(one, Record):
        return one.put(places, two)
    one, two = _alike(one, two)
    return one.index_copy_(0, places, two)


def _alike(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Where an axis other than the first differs, the shorter is filled with zeros that are never read."""
    if one.shape[1:] == two.shape[1:]:
        return one, two
    shape = [max(sizes) for sizes in zip(one.shape[1:], two.shape[1:], strict=True)]
    return _filled(one, shape), _filled(two, shape)


def _filled(x: Tensor, shape: list[int]) -> Tensor:
    missing = [wanted - size for wanted, size in zip(shape, x.shape[1:], strict=True)]
    return F.pad(x, [amount for size in reversed(missing) for amount in (0, size)])
