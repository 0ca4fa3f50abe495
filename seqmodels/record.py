"""Record: tensors that have the row, or the request, on axis 0, and so join and leave together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Record:
    """Fields are tensors with the request on axis 0, records of the same requests, or None."""

    def select(self, requests: Tensor) -> Self:
        """Some requests (M,) of int64, in the given order, repeats allowed."""
        return self._each(lambda x: x.select(requests) if isinstance(x, Record) else x.index_select(0, requests))

    def to(self, device: torch.device) -> Self:
        return self._each(lambda x: x.to(device))

    def concat(self, *others: Self) -> Self:
        """These requests, then those of the others. Where other axes differ, the shorter are filled with zeros."""
        return self._each(_concat, *others)

    def put(self, places: Tensor, other: Self) -> Self:
        """The same with the other's requests in some places (M,). Written in place where there is room, so this one is
        not to be used again; another object, so that whoever has copied this one sees that it has changed."""
        return self._each(lambda one, two: _put(one, places, two), other)

    def changed(self, **changes: Any) -> Self:
        """The same with other values of some fields: `dataclasses.replace` takes as long as several tensor operations,
        and a step would pay for it several times."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **changes)
        return new

    def _each(self, change: Callable[..., Any], *others: Self) -> Self:
        """Every field that is not None changed, given the same fields of the others."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return self.changed(
            **{name: change(value, *(vars(other)[name] for other in others)) for name, value in values.items()}
        )


def _concat(*values: Any) -> Any:
    first, *others = values
    return first.concat(*others) if isinstance(first, Record) else torch.cat(_alike(*values))


def _put(one: Any, places: Tensor, two: Any) -> Any:
    if isinstance(one, Record):
        return one.put(places, two)
    one, two = _alike(one, two)
    return one.index_copy_(0, places, two)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """Where an axis other than the first differs, the shorter are filled with zeros that are never read."""
    if len({x.shape[1:] for x in tensors}) == 1:
        return list(tensors)
    shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
    return [_filled(x, shape) for x in tensors]


def _filled(x: Tensor, shape: list[int]) -> Tensor:
    missing = [wanted - size for wanted, size in zip(shape, x.shape[1:], strict=True)]
    return F.pad(x, [amount for size in reversed(missing) for amount in (0, size)])
