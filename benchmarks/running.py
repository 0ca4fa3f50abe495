"""A real service, or what is measured beside one, as a user starts it: `python -m ...` in a process of its own, on
loopback, with its own Ray. For benchmarks and tests alike."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.environment import free_port

ROOT = Path(__file__).parents[1]
START_S = 180


@dataclass(frozen=True)
class Running:
    """home: of its log and its Ray's files. Its input is a pipe."""

    port: int
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it has said."""
        return (self.home / "log").read_text()

    @property
    def cluster(self) -> str:
        """The address of its Ray cluster, as the service says itself."""
        (address,) = re.findall(r"its Ray cluster at (\S+);", self.log)
        return str(address)

    def wait_until_it_says(self, words: str) -> None:
        """At the beginning of a line."""

        def is_said() -> bool:
            assert self.process.poll() is None, self.log
            return any(line.startswith(words) for line in self.log.splitlines())

        until(is_said, START_S)

    def processes(self, name: str) -> list[int]:
        """Of those that descend from it, the ones whose command holds this name."""
        parents: dict[int, int] = {}
        commands: dict[int, str] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(directory.name)] = int(_statistics(int(directory.name))[1])
                commands[int(directory.name)] = (directory / "cmdline").read_text(errors="replace")
        return [pid for pid, command in commands.items() if name in command and self.process.pid in _line(pid, parents)]

    def resident_bytes(self, name: str) -> int:
        """Of these processes together."""
        pages = 0
        for process in self.processes(name):
            with contextlib.suppress(OSError):  # it has ended
                pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor_seconds(self, name: str) -> float:
        """That these processes together have taken so far."""
        ticks = 0
        for process in self.processes(name):
            with contextlib.suppress(OSError):  # it has ended
                user, system = _statistics(process)[11:13]
                ticks += int(user) + int(system)
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal; it must end by itself, in peace, and leave no process behind."""
        self.process.send_signal(number)
        assert self.process.wait(90) == 0, self.log[-3000:]
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(self.home) in _read(path)]
        assert not left, left


def _statistics(process: int) -> list[str]:
    """What stands in /proc/PID/stat after the command, whose name may hold anything: state, parent, ..."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _line(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process > 1:
        yield process
        process = parents.get(process, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


@contextlib.contextmanager
def started(module: str, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """`python -m module arguments --port PORT`, with a port that is free. Not waited for; ended at the end."""
    home, port = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")), free_port()  # a socket's path must be short
    with (home / "log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port", str(port)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "RAY_TMPDIR": str(home)},
        )  # fmt: skip
    service = Running(port, process, home)
    try:
        yield service
        service.end()
    except BaseException:
        print(service.log[-3000:], file=sys.stderr)
        raise
    finally:
        _stop(process)
        shutil.rmtree(home, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """What has not ended by itself."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def running(
    models: dict[str, str], environment: dict[str, str] | None = None, module: str = "serving", **fields: Any
) -> Iterator[Running]:
    """A service that answers. fields: of its ServeConfig. module: what is run in place of the service's own."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"models": models, **fields}, file, sort_keys=False)
        file.flush()
        with started(module, file.name, environment=environment) as service:
            service.wait_until_it_says("serving ")
            yield service


def until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {seconds} s"
        time.sleep(0.1)
