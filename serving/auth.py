"""API keys: read from a file or the environment, kept as hashes, compared in constant time. Knows no HTTP."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from seqmodels.errors import ConfigError

ENVIRONMENT_VARIABLE = "SEQMODELS_API_KEYS"
MIN_LENGTH = 16


def load_key_hashes(api_keys_file: str | None) -> tuple[str, ...]:
    """SHA-256 of every key in the file (one per line, `#` starts a comment), else in the environment variable.

    Empty if neither is there: then the service asks for no key. Raises ConfigError for an unreadable or empty file
    and for a short key.
    """
    if api_keys_file is None:
        source = f"the environment variable {ENVIRONMENT_VARIABLE}"
        keys = os.environ.get(ENVIRONMENT_VARIABLE, "").replace(",", "\n").splitlines()
    else:
        source = f"api_keys_file {api_keys_file}"
        try:
            keys = Path(api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{source} cannot be read") from None
    keys = [key.strip() for key in keys if key.strip() and not key.lstrip().startswith("#")]
    if api_keys_file is not None and not keys:
        raise ConfigError(f"{source} holds no key; write one per line or leave api_keys_file out")
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_LENGTH:
            raise ConfigError(f"key {number} of {source} has {len(key)} characters; use at least {MIN_LENGTH}")
    return tuple(hash_key(key) for key in keys)


def hash_key(key: str) -> str:
    # Keys are long and random, not chosen by people, so one fast hash is enough.
    return hashlib.sha256(key.encode()).hexdigest()


def is_known(key: str, key_hashes: Sequence[str]) -> bool:
    """Whether the key is one of those hashed. Takes the same time for every key: all hashes are compared."""
    given = hash_key(key)
    known = False
    for key_hash in key_hashes:
        known |= hmac.compare_digest(given, key_hash)
    return known
