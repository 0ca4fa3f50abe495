"""States as bytes, so that a later request can go on as if there had been no end: SavedState, where an output stands;
and the plain State of an input that a classifier or tagger reads in pieces.

Knows tokens, numbers and bytes; knows no model, no text and no search. The bytes are a safetensors file with JSON in
its metadata, and fit the very model that made them and no other. A checksum tells damage, not forgery.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import safetensors
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from seqmodels.config import Strict, Weights
from seqmodels.errors import InputError
from seqmodels.state import State

FORMAT_VERSION: Literal[1] = 1
VALUES, TOKENS = {"values": torch.float32}, {"tokens": torch.int64}
Count = Annotated[int, Field(ge=0, lt=2**62)]


class Maker(Strict):
    """What a state fits: the model's revision; of a generator, what its step computes in, and the `fingerprint` of the
    shortlist that it chooses tokens from, "" without one. decoder_weights is None of a model that answers with labels.
    """

    revision: str
    decoder_weights: Weights | None
    shortlist: str = ""

    def __str__(self) -> str:
        if self.decoder_weights is None:
            return f"{self.revision} that answers with labels"
        chosen_from = f"shortlist {self.shortlist}" if self.shortlist else "no shortlist"
        return f"{self.revision} in {self.decoder_weights} with {chosen_from}"


class Position(Strict):
    """Where in its draws an output stands.

    num_generated: how many of the last tokens were generated since a text was last given. step: tokens generated since
    the first start, output: its index then; with the seed, what a draw depends on. inputs: `fingerprint` of them.
    """

    num_generated: Count
    step: Count
    output: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    inputs: str


@dataclass(frozen=True)
class SavedState:
    """tokens: all so far, given and generated, without a final EOS. values: the recurrent state, one row, after all of
    them but the last, which is read when it goes on."""

    tokens: tuple[int, ...]
    values: bytes  # of State.to_bytes
    position: Position

    def state(self, width: int) -> State:
        return State.from_bytes(self.values, width)

    def to_bytes(self, maker: Maker) -> bytes:
        values = torch.frombuffer(bytearray(self.values), dtype=torch.float32)
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        return _written({"values": values, "tokens": tokens}, maker, self.position)

    @classmethod
    def from_bytes(cls, data: bytes, here: Maker, width: int, vocab_size: int) -> "SavedState":
        """Raises InputError for anything but what `to_bytes` gave, for the model that is described here."""
        tensors, at = _read(data, here, VALUES | TOKENS, width)
        if at is None:
            raise _damaged()
        tokens = tensors["tokens"]
        if tokens.dim() != 1 or ((tokens < 0) | (tokens >= vocab_size)).any():
            raise _error(f"holds something that is none of this model's {vocab_size} tokens")
        if at.num_generated > len(tokens):
            raise _error(f"says that {at.num_generated} of its {len(tokens)} tokens were generated")
        return cls(tuple(tokens.tolist()), State(tensors["values"][None]).to_bytes(), at)


def input_state_to_bytes(state: State, maker: Maker) -> bytes:
    """state: one row, after all of an input so far."""
    return _written({"values": state.values[0].cpu()}, maker, None)


def input_state_from_bytes(data: bytes, here: Maker, width: int) -> State:
    """Raises InputError for anything but what `input_state_to_bytes` gave, for the model that is described here."""
    tensors, _ = _read(data, here, VALUES, width)
    return State(tensors["values"][None])


class _About(Strict):
    version: Literal[1]
    maker: Maker
    at: Position | None  # of an output
    checksum: str = ""  # sha256 hex over all of the above and the tensors


def fingerprint(inputs: Tensor | None) -> str:
    """What tells inputs apart; "" where there are none."""
    if inputs is None:
        return ""
    about = f"{inputs.dtype} {tuple(inputs.shape)} ".encode()
    return hashlib.sha256(about + _bytes(inputs)).hexdigest()


def _written(tensors: dict[str, Tensor], maker: Maker, at: Position | None) -> bytes:
    about = _About(version=FORMAT_VERSION, maker=maker, at=at)
    about = about.model_copy(update={"checksum": _checksum(about, tensors)})
    return save(tensors, {"state": about.model_dump_json()})


def _read(
    data: bytes, here: Maker, dtypes: dict[str, torch.dtype], width: int
) -> tuple[dict[str, Tensor], Position | None]:
    """What `_written` was given, checked as far as all states are alike."""
    tensors, about = _parsed(data)
    if about.maker != here:
        raise _error(f"was made by a model {about.maker}, but this one is {here}; go on with the one that made it")
    if {name: tensor.dtype for name, tensor in tensors.items()} != dtypes:
        raise _damaged()
    if about.checksum != _checksum(about, tensors):
        raise _damaged()
    values = tensors["values"]
    if values.shape != (width,) or not values.isfinite().all():
        raise _error(f"does not hold the {width} finite numbers of this model's state")
    return tensors, about.at


def _parsed(data: bytes) -> tuple[dict[str, Tensor], _About]:
    try:
        tensors = load(data)  # has checked the header that is read next
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        version = json.loads(header["__metadata__"]["state"])["version"]
        if version != FORMAT_VERSION:
            raise _error(f"is of version {str(version)[:20]}, but this program knows version {FORMAT_VERSION}")
        return tensors, _About.model_validate_json(header["__metadata__"]["state"])
    except (
        safetensors.SafetensorError,
        ValidationError,
        ValueError,
        LookupError,
        TypeError,
        AssertionError,
        RecursionError,
    ):
        raise _damaged() from None


def _checksum(about: _About, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(about.model_dump_json(exclude={"checksum"}).encode())
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _damaged() -> InputError:
    return _error("is damaged or no state; send the bytes that return_state gave")


def _error(what: str) -> InputError:
    return InputError(f"state {what}", param="state")
