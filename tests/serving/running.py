"""A real service, as a user starts one: `python -m serving` in a process of its own, on loopback, with its own Ray."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
START_S = 180


@dataclass(frozen=True)
class Running:
    """home: of its Ray's files."""

    address: str
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    @property
    def cluster(self) -> str:
        """The address of its Ray cluster, as it says itself."""
        (address,) = re.findall(r"its Ray cluster at (\S+);", self.log)
        return str(address)

    def processes(self, name: str) -> list[int]:
        """Of those that descend from it, the ones whose command holds this name."""
        parents: dict[int, int] = {}
        commands: dict[int, str] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(directory.name)] = (directory / "cmdline").read_text(errors="replace")
        return [pid for pid, command in commands.items() if name in command and self.process.pid in _line(pid, parents)]


def _line(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process > 1:
        yield process
        process = parents.get(process, 0)


@contextlib.contextmanager
def running(
    models: dict[str, str], environment: dict[str, str] | None = None, module: str = "serving", **fields: Any
) -> Iterator[Running]:
    """fields: of its ServeConfig. module: what is run in place of the service's own."""
    home, port = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")), free_port()  # a socket's path must be short
    (home / "service.yaml").write_text(yaml.safe_dump({"models": models, "port": port, **fields}))
    with (home / "log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(home / "service.yaml")],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "RAY_TMPDIR": str(home)},
        )  # fmt: skip
    service = Running(f"http://127.0.0.1:{port}", process, home)
    try:
        until(lambda: _is_ready(service), START_S)
        yield service
    except BaseException:
        print(service.log[-3000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGINT)
        try:
            status, log = process.wait(90), service.log
        finally:
            if process.poll() is None:
                process.kill()
            shutil.rmtree(home, ignore_errors=True)
    assert status == 0, log[-3000:]


def _is_ready(service: Running) -> bool:
    assert service.process.poll() is None, service.log
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{service.address}/readyz", timeout=5).status_code == 200
    return False


def until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {seconds} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
