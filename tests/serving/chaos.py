"""A real service with two replicas, under load, to which everything happens that can.

    python -m tests.serving.chaos --kills 50 --leaves 1000 --swaps 100 --silent 1000

    kills   a replica is killed, again and again. Through our client nothing is lost and nothing is wrong; of requests
            that nobody asks again, only those fail that were in flight, each with an error that says so, within 5 s
    leaves  clients leave in mid-stream; no rows are left behind
    swaps   two models change while they are asked, a fifth of the times to one that is damaged: that one is refused,
            nothing fails, and every answer is that of the revision it names
    silent  connections on which nothing comes, or half a head, or half a body: closed within 10 s, others are served

Every answer is compared with the pipeline's, offline. Prints one line of JSON for each part; the exit status is 1 where
a promise was broken.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.progress import track

from benchmarks.running import Running, running, until
from serving.client import Client

from .golden import FIELDS, PATHS, TEXTS, Golden
from .model_directories import save_all

CLIENTS, WITHOUT_RETRY = 4, 4
ERROR_S = 5.0  # from a kill to the error of whom the replica did not answer
SILENT_S = 10.0
LATE_S = 1.0  # what a busy machine may add
MODELS = ("mood", "en-de", "story")


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        models = two_of_each(Path(directory))
        first = {name: one for name, (one, _) in models.items()}
        with running(first, replicas=2, profile=options.profile, requests_per_minute=None) as service:
            golden = Golden(models)
            with joined(service):
                results = [
                    killed(service, golden, options.kills),
                    left(service, options.leaves),
                    swapped(service, golden, models, options.swaps),
                    silent(service, golden, options.silent if options.profile == "haproxy" else 0),
                ]
    return 1 if any(result["broken"] for result in results) else 0


def two_of_each(directory: Path) -> dict[str, tuple[str, str]]:
    """Name -> two directories with other weights."""
    one, two = save_all(directory / "one"), save_all(directory / "two", seed=2)
    return {name: (one[name], two[name]) for name in MODELS}


# Clients


@dataclass
class Load:
    """Clients that ask without a pause, from `asking` on until it ends."""

    address: str
    golden: Golden
    right: int = 0
    wrong: int = 0
    failures: list[tuple[float, float, str]] = field(default_factory=list)  # when asked, when told, what

    @contextlib.contextmanager
    def asking(self, clients: int, ask: Callable[[str, str], dict[str, Any]]) -> Iterator[None]:
        """ask: of a model and a text, its answer as JSON."""
        over = threading.Event()
        threads = [threading.Thread(target=self._ask_on, args=(number, ask, over)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask_on(self, number: int, ask: Callable[[str, str], dict[str, Any]], over: threading.Event) -> None:
        drawn = random.Random(number)
        while not over.is_set():
            name, text, began = drawn.choice(MODELS), drawn.choice(TEXTS), time.monotonic()
            try:
                is_right = self.golden.is_right(name, text, ask(name, text))
            except Exception as error:
                self.failures.append((began, time.monotonic(), repr(error)[:200]))
            else:
                self.right += is_right
                self.wrong += not is_right

    def told(self) -> dict[str, Any]:
        kinds = Counter(what for _, _, what in self.failures)
        return {"right": self.right, "wrong": self.wrong, "failed": len(self.failures), "errors": kinds.most_common(5)}


def by_client(address: str) -> Callable[[str, str], dict[str, Any]]:
    """Through our client, which asks once more where a replica died."""
    client = Client(address)

    def ask(name: str, text: str) -> dict[str, Any]:
        answer = getattr(client, PATHS[name])(text, model=name, **FIELDS[name])
        told: dict[str, Any] = answer.model_dump(exclude_none=True, mode="json")
        return told

    return ask


def once(address: str) -> Callable[[str, str], dict[str, Any]]:
    """As a client does that asks nothing again; a connection for each, as one that is dead would be found so later."""

    def ask(name: str, text: str) -> dict[str, Any]:
        body = {"model": name, "inputs": text, **FIELDS[name]}
        response = httpx.post(f"{address}/v1/{PATHS[name]}", json=body, timeout=60)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.text[:150]}")
        told: dict[str, Any] = response.json()
        return told

    return ask


# What happens


@dataclass(frozen=True)
class Kill:
    """sent: when the signal was. gone: when the process was, which until then may still have taken a request."""

    sent: float
    gone: float

    def explains(self, began: float, told: float) -> bool:
        """Whether a request that failed was in flight meanwhile, and its client told within the time for that."""
        return began <= self.gone and self.sent <= told <= self.sent + ERROR_S


def kill(process: int) -> Kill:
    """Kill a process that is no child of ours, and wait until it is gone."""
    handle = os.pidfd_open(process)
    try:
        sent = time.monotonic()
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], 30)[0], f"process {process} does not die"
        return Kill(sent, time.monotonic())
    finally:
        os.close(handle)


def killed(service: Running, golden: Golden, times: int) -> dict[str, Any]:
    """Kill the replica that is oldest, wait until two answer again, and so on."""
    asked_again, asked_once = Load(service.address, golden), Load(service.address, golden)
    kills: list[Kill] = []
    with (
        asked_again.asking(CLIENTS, by_client(service.address)),
        asked_once.asking(WITHOUT_RETRY, once(service.address)),
    ):
        for _ in track(range(times), "kills", disable=not sys.stderr.isatty()):
            kills.append(kill(min(service.processes("ray::ServeReplica:"))))
            until(lambda: two_answer(service), 120)
    failures = [(began, told) for began, told, _ in asked_once.failures]
    in_flight = Counter(sum(one.explains(*failure) for failure in failures) for one in kills)
    slowest_ms = max((1000 * (one.gone - one.sent) for one in kills), default=0.0)
    broken = {
        "lost": len(asked_again.failures),
        "wrong": asked_again.wrong + asked_once.wrong,
        "failed without cause, or late": sum(not any(one.explains(*failure) for one in kills) for failure in failures),
        "kills missing": times - len(kills),
        "slow to die": sum(one.gone - one.sent > LATE_S for one in kills),  # it would explain too much
    }
    return say(
        "kills", broken, kills=times, with_client=asked_again.told(), asked_once=asked_once.told(),
        failed_of_one_kill=dict(sorted(in_flight.items())), slowest_death_ms=slowest_ms,
    )  # fmt: skip


def left(service: Running, times: int) -> dict[str, Any]:
    """Begin a long stream, read its first piece, leave."""
    fields = {"stream": True, "max_new_tokens": 500, "min_new_tokens": 500}
    body = json.dumps({"model": "story", "inputs": "on", **fields})
    head = f"POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json"
    begun = 0
    for _ in track(range(times), "leaves", disable=not sys.stderr.isatty()):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            client.sendall(f"{head}\r\n\r\n{body}".encode())
            begun += client.recv(65536).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    with contextlib.suppress(AssertionError):
        until(lambda: not any(_rows(service) for _ in range(10)), 10)
    rows = max(_rows(service) for _ in range(20))  # either replica may be the one that says so
    return say(
        "leaves", {"not begun": times - begun, "rows left": rows}, leaves=times, seconds=time.monotonic() - began
    )


def _rows(service: Running) -> int:
    models = httpx.get(f"{service.address}/readyz", timeout=30).json()["models"]
    return sum(about["rows_live"] + about["rows_waiting"] for about in models.values())


def swapped(service: Running, golden: Golden, models: dict[str, tuple[str, str]], times: int) -> dict[str, Any]:
    """Two models change together, forth and back; every fifth time to a copy that is damaged."""
    from serving import cluster
    from serving.config import ModelSet

    load, refused, taken = Load(service.address, golden), 0, 0
    with tempfile.TemporaryDirectory() as directory, load.asking(CLIENTS, once(service.address)):
        for number in track(range(times), "swaps", disable=not sys.stderr.isatty()):
            before = cluster.model_set()
            is_damaged = number % 5 == 4
            to = {name: models[name][(number + 1) % 2] for name in ("mood", "story")}
            if is_damaged:
                to["mood"] = str(damaged(Path(to["mood"]), Path(directory, str(number)), number))
            told = cluster.change_models(ModelSet.parse({"models": {**before.models, **to}}))
            if all(report["refused"] for report in told):
                refused += 1
                cluster.change_models(before)
            taken += not any(report["refused"] for report in told)
    wanted = times // 5
    broken = {"failed": len(load.failures), "wrong": load.wrong, "damaged taken": wanted - refused}
    broken["good refused"] = times - wanted - taken
    return say("swaps", broken, swaps=times, refused=refused, **load.told())


def damaged(model: Path, copy: Path, number: int) -> Path:
    """A copy with its weights cut short, with a bit turned, or without them; or with a config that is none."""
    shutil.copytree(model, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    match number // 5 % 4:
        case 0:
            weights.write_bytes(data[: len(data) // 2])
        case 1:
            data[len(data) // 2 + number % 100] ^= 1 << number % 8
            weights.write_bytes(data)
        case 2:
            weights.unlink()
        case _:
            (copy / "config.json").write_text("{")
    return copy


def silent(service: Running, golden: Golden, count: int) -> dict[str, Any]:
    """Connections on which nothing more comes, while others are served."""
    head = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n"
    sent = itertools.cycle([b"", head, head + b"\r\n{"])
    load, seconds = Load(service.address, golden), []
    with contextlib.ExitStack() as stack, load.asking(1, by_client(service.address)):
        open_at = []
        for data, _ in zip(sent, range(count), strict=False):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=30))
            client.sendall(data)
            open_at.append((client, time.monotonic()))
        for client, began in open_at:
            client.settimeout(SILENT_S + 30)
            while client.recv(4096):
                pass
            seconds.append(time.monotonic() - began)
    slowest = max(seconds, default=0.0)
    broken = {"open for too long": sum(one > SILENT_S + LATE_S for one in seconds), "wrong": load.wrong}
    broken["others failed"] = len(load.failures)
    return say("silent", broken, connections=count, slowest=slowest, **load.told())


# Ray


@contextlib.contextmanager
def joined(service: Running) -> Iterator[None]:
    """Be a part of its cluster, to ask its replicas and tell them; but not at its end, for Ray would wait for it."""
    import ray

    from serving import cluster

    cluster.connect(service.cluster)
    try:
        yield
    finally:
        ray.shutdown()


def two_answer(service: Running) -> bool:
    """Whether Serve has two replicas again, and no other. Those that still begin have another name."""
    from serving import cluster

    states = cluster.replica_states()
    return states == {"RUNNING": 2} and len(service.processes("ray::ServeReplica:")) == 2


def say(part: str, broken: dict[str, int], **fields: Any) -> dict[str, Any]:
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in fields.items()}
    result = {"part": part, **rounded, "broken": {name: count for name, count in broken.items() if count}}
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--silent", type=int, default=1000)
    parser.add_argument("--profile", choices=["plain", "haproxy"], default="haproxy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
