"""States that clients hold: sealed, so that what comes back is what went out, from this service and not too long ago.

A sealed state is base64 of: version (1 byte), when it expires (8, seconds since 1970), where it was made (8), by how
many decoder rows (4), the pipeline's own state, and a signature of all that (32, HMAC-SHA256). It is signed and not
encrypted: it holds numbers and tokens of its own client's text. Who holds one may go on from it as often as he likes.
Knows no HTTP.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from seqmodels.errors import ConfigError, InputError

VERSION = 1
HEADER = struct.Struct(">BQ8sI")
SIGNATURE_BYTES = 32
MIN_KEY_LENGTH = 32


@dataclass(frozen=True)
class Opened:
    """What was in a sealed state. field: where it was in the request, such as `state[1]`. width: decoder rows of the
    request that gave it. from_here: whether it was made where the same numbers come out."""

    field: str
    state: bytes
    width: int
    from_here: bool


class Seal:
    """Signs states and checks what comes back. All replicas of a service have the same key."""

    def __init__(self, key: bytes, lifetime_s: float, place: bytes) -> None:
        """place: 8 bytes that are the same wherever the same numbers come out."""
        self._key = key
        self._lifetime_s = lifetime_s
        self._place = place

    def seal(self, state: bytes, width: int) -> str:
        body = HEADER.pack(VERSION, int(time.time() + self._lifetime_s), self._place, width) + state
        return base64.urlsafe_b64encode(body + self._sign(body)).decode("ascii").rstrip("=")

    def open(self, sealed: str, field: str) -> Opened:
        """Raises InputError for what was not sealed with this key, or too long ago."""
        try:
            data = base64.b64decode(sealed + "=" * (-len(sealed) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        body, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        if len(body) < HEADER.size or not hmac.compare_digest(signature, self._sign(body)):
            message = f"{field} is not what this service gave, or was changed; send what return_state gave, as it was"
            raise InputError(message, param=field, code="state_invalid")
        version, expires_at, place, width = HEADER.unpack_from(body)
        if version != VERSION:
            message = f"{field} is of version {version}, but this service knows version {VERSION}; begin anew"
            raise InputError(message, param=field, code="state_invalid")
        if expires_at < time.time():
            message = f"{field} is older than the {self._lifetime_s:.0f} s that this service keeps one; begin anew"
            raise InputError(message, param=field, code="state_expired")
        return Opened(field, body[HEADER.size :], width, place == self._place)

    def _sign(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")


def load_state_key(state_key_file: str | None) -> bytes:
    """What the file holds, or a new key where there is none. Raises ConfigError for a file that is no key."""
    if state_key_file is None:
        return secrets.token_bytes(32)
    try:
        key = Path(state_key_file).read_bytes().strip()
    except OSError:
        raise ConfigError(f"state_key_file {state_key_file} cannot be read") from None
    if len(key) < MIN_KEY_LENGTH:
        message = (
            f"state_key_file {state_key_file} holds {len(key)} characters; write at least {MIN_KEY_LENGTH} at random"
        )
        raise ConfigError(message)
    return key


def this_place(device: str) -> bytes:
    """What the bits of an answer depend on, beside the model: processor, kernels, threads and versions."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    kind = torch.cuda.get_device_name() if on_gpu else _processor()
    parts = (kind, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__)
    return hashlib.sha256(repr(parts).encode()).digest()[:8]


def _processor() -> str:
    """As Linux names it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")
