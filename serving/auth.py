"""API keys: who may ask, how often and how urgently. Kept as hashes, compared in constant time. Knows no HTTP.

A file holds one key per line (`#` starts a comment), as it is or, better, as the line that `python -m serving key`
prints: its hash, and what it is allowed.

    sha256:9f86d081884c7d65... name=search priority=high requests_per_minute=600
"""

import argparse
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError

from seqmodels.config import Strict, explain
from seqmodels.errors import ConfigError

ENVIRONMENT_VARIABLE = "SEQMODELS_API_KEYS"
MIN_LENGTH = 16
HASHED = "sha256:"
Priority = Literal["low", "normal", "high"]
PRIORITIES: dict[str, int] = {"low": -1, "normal": 0, "high": 1}


class ApiKey(Strict):
    """What is known of a key. name: in logs, and whose turn it is; keys of one name count as one client."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    name: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,40}$")]
    priority: Priority = "normal"  # the highest that it may ask for
    requests_per_minute: PositiveInt | None = None  # over all replicas; in place of the service's own


ANYBODY = ApiKey(sha256="0" * 64, name="anybody", priority="high")  # where the service has no keys


def load_keys(api_keys_file: str | None) -> tuple[ApiKey, ...]:
    """Every key of the file, else of the environment variable. Empty if neither is there: then none is asked for.

    Raises ConfigError for an unreadable file, one without any key, a variable without any, a short key and a line that
    says what we do not know.
    """
    if api_keys_file is None:
        source = f"the environment variable {ENVIRONMENT_VARIABLE}"
        lines = os.environ.get(ENVIRONMENT_VARIABLE, "").replace(",", "\n").splitlines()
    else:
        source = f"api_keys_file {api_keys_file}"
        try:
            lines = Path(api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{source} cannot be read") from None
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines and (api_keys_file is not None or ENVIRONMENT_VARIABLE in os.environ):
        fix = "leave api_keys_file out" if api_keys_file is not None else "unset it"
        raise ConfigError(f"{source} holds no key; write one per line, or {fix} for a service that asks for none")
    return tuple(_key(line, f"key {number} of {source}") for number, line in enumerate(lines, start=1))


def _key(line: str, where: str) -> ApiKey:
    if not line.startswith(HASHED):
        if len(line) < MIN_LENGTH:
            raise ConfigError(f"{where} has {len(line)} characters; use at least {MIN_LENGTH}")
        hashed = hash_key(line)
        return ApiKey(sha256=hashed, name=hashed[:8])
    hashed, *options = line.removeprefix(HASHED).split()
    fields: dict[str, str] = {"sha256": hashed, "name": hashed[:8]}
    for option in options:
        name, _, value = option.partition("=")
        fields[name] = value
    try:
        return ApiKey.model_validate_strings(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, ApiKey)}") from None


def hash_key(key: str) -> str:
    # Keys are long and random, not chosen by people, so one fast hash is enough.
    return hashlib.sha256(key.encode()).hexdigest()


def find_key(given: str, keys: Sequence[ApiKey]) -> ApiKey | None:
    """The key that was given. Takes the same time for every key: it is compared with all."""
    hashed, found = hash_key(given), None
    for key in keys:
        if hmac.compare_digest(hashed, key.sha256):
            found = key
    return found


def main(arguments: Sequence[str]) -> int:
    """`python -m serving key`: a new key for a client, and the line about it for the service's file."""
    parser = argparse.ArgumentParser(
        "python -m serving key",
        description="Make an API key: what the client sends, and the line for api_keys_file, which does not tell it.",
    )
    parser.add_argument("--name", help="of the client, in logs (default: the hash's first letters)")
    parser.add_argument("--priority", choices=list(PRIORITIES), help="the highest it may ask for (default: normal)")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="over all replicas")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    key = secrets.token_urlsafe(32)
    hashed = hash_key(key)
    try:
        ApiKey(**{"sha256": hashed, "name": hashed[:8], **given})
    except ValidationError as error:
        raise ConfigError(explain(error, ApiKey)) from None
    options = "".join(f" {name}={value}" for name, value in given.items())
    print(f"key:  {key}\nline: {HASHED}{hashed}{options}")
    return 0
