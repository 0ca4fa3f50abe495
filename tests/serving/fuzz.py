"""Requests in number, four fifths of them damaged: does any get a 5xx, a wrong answer or none, and does memory grow?

    python -m tests.serving.fuzz [--requests 1000000] [--seed 0] [--first 0] [--together 16]

The app runs in this process over small real models and is asked without a socket, a few requests at a time, so that
they share batches. One request in five is valid, and its answer must be what the library alone gave beforehand. How
each of the others was made, and what came back, is counted as it comes, for some damage leaves a request valid.

Exit status 1 after a violation; each is told with what makes it again: `--seed S --first NUMBER --requests 1`.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from rich.progress import Progress
from starlette.types import ASGIApp, Message

from seqmodels.pipeline import Pipeline
from serving import schema
from serving.completions import CompletionResponse
from serving.models import Models
from serving.states import Seal, this_place

from .conftest import STATE_KEY, api_key, app_over
from .events import events
from .fuzz_pictures import bombs
from .fuzz_requests import request
from .fuzz_valid import KEY, Ask, Bank, Reply
from .model_directories import save_all

SLOW_S = 1.0
LOST_S = 60.0  # after which nothing more is waited for
MOST_GROWTH_MB = 20.0
WARM = 0.05  # of the requests, and so many at least, after which memory is expected to have found its size
LEAST_WARM = 8000
MOST_VIOLATIONS = 10
TRIES = 3  # of a slow request: the machine may have been busy with something else
Around = Callable[[ASGIApp], ASGIApp]
LEFT = 0  # in place of the status where the client was gone before one came
# 307: the router's answer to a path with a slash too many.
DOCUMENTED = {LEFT, 200, 307, 400, 401, 403, 404, 405, 408, 413, 415, 421, 422}
SHAPES: dict[str, type[BaseModel]] = {
    "/v1/classify": schema.ClassifyResponse,
    "/v1/tag": schema.TagResponse,
    "/v1/translate": schema.GenerateResponse,
    "/v1/caption": schema.GenerateResponse,
    "/v1/generate": schema.GenerateResponse,
    "/v1/score": schema.ScoreResponse,
    "/v1/completions": CompletionResponse,
    "/v1/models": schema.ModelList,
}
# So low that whatever is allowed is quick: what takes long then hangs.
LIMITS = {
    "body_bytes": 1_000_000, "inputs": 64, "characters": 500, "words": 100, "features": 600, "frames": 16,
    "max_new_tokens": 16, "batches": 64,
}  # fmt: skip


@dataclass
class Tally:
    """What came back so far. violations: as they are told."""

    counts: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # kind, route, status
    num_asked: int = 0
    num_golden: int = 0
    num_repeated: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    violations: list[str] = field(default_factory=list)
    warm_mb: float | None = None
    growth_mb: float = 0.0

    @property
    def is_over(self) -> bool:
        return len(self.violations) >= MOST_VIOLATIONS

    def note(self, number: int, asked: Ask, reply: Reply, seconds: float) -> None:
        """seconds: at best, where it was asked more than once."""
        self.num_asked += 1
        self.num_golden += asked.golden is not None
        self.num_repeated += reply.seconds > SLOW_S
        self.counts[asked.kind, _route(asked), reply.status] += 1
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = seconds, f"{number} ({asked.kind})"

    def line(self, seconds: float) -> str:
        memory = f"{self.growth_mb:+.1f} MB since {self.warm_mb or 0.0:.0f} MB"
        return f"{self.num_asked} asked in {seconds:.0f} s, slowest {self.slowest_s:.2f} s, memory {memory}"

    def weigh(self) -> None:
        """Compare memory with what it was when all was warm."""
        resident = resident_mb()
        if self.warm_mb is None:
            self.warm_mb = resident
        self.growth_mb = resident - self.warm_mb


def resident_mb() -> float:
    """Memory of this process, once the allocator has let go of what is free."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def steady_allocator() -> None:
    """Have glibc use one arena and give large blocks back at once. With an arena for each thread, and a bound between
    small and large that rises, holes between blocks grow by tens of MB for the first ten thousands of requests, and
    would hide a leak of that size."""
    if sys.platform == "linux":
        libc, arenas, least_mapped = ctypes.CDLL(None), -8, -3  # M_ARENA_MAX, M_MMAP_THRESHOLD
        libc.mallopt(arenas, 1)
        libc.mallopt(least_mapped, 128 * 1024)


def keep_no_primitives() -> None:
    """Have oneDNN and torch's layer over it forget each primitive, the code made for one shape of input. To be called
    before the first operation. They would keep the last 1024 of them, half a MB each: memory grows for a million
    requests by what rare shapes add, and would hide a leak of that size. Answers have the same bits without."""
    os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}


def small_models(directory: Path) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(path) for name, path in save_all(directory).items()}


def seal() -> Seal:
    """As the app has it."""
    return Seal(STATE_KEY, 86_400.0, this_place("cpu"))


def fuzzed_app(pipelines: dict[str, Pipeline]) -> tuple[FastAPI, Models]:
    return app_over(pipelines, keys=(api_key(KEY),), limits=LIMITS, max_requests=4096)


# -- ask


async def ask(app: ASGIApp, asked: Ask) -> Reply:
    """Send one request, as a server would, and take all of the answer."""
    status, content_type, parts = LEFT, "", []
    half = len(asked.content) // 2
    messages: list[Message] = [
        {"type": "http.request", "body": asked.content[:half], "more_body": True},
        {"type": "http.request", "body": asked.content[half:], "more_body": False},
    ]
    messages = messages[: asked.leaves_after]

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        if asked.leaves_after is None:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, content_type
        if message["type"] == "http.response.start":
            status = message["status"]
            content_type = dict(message["headers"]).get(b"content-type", b"").decode("latin-1")
        else:
            parts.append(message.get("body", b""))

    started_at, error = time.monotonic(), None
    try:
        async with asyncio.timeout(LOST_S):
            await app(_scope(asked), receive, send)
    except Exception as raised:
        error = raised
    return Reply(status, content_type, b"".join(parts), time.monotonic() - started_at, error)


def _scope(asked: Ask) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


# -- judge


def fault_of(asked: Ask, reply: Reply) -> str | None:
    """What is wrong with an answer."""
    if reply.error is not None:
        return f"it raised {reply.error!r}"
    if reply.status == 429 and asked.kind == "headers":
        return None  # it said that it waits for less than an answer takes beside others
    if reply.status not in DOCUMENTED:
        return f"status {reply.status}"
    if reply.status == LEFT:
        return None if asked.leaves_after is not None else "no answer"
    try:
        if asked.golden is not None:
            return _golden_fault(asked, reply)
        return _shape_fault(asked, reply)
    except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
        return f"an answer of another shape: {error!r}"


def _golden_fault(asked: Ask, reply: Reply) -> str | None:
    assert asked.golden is not None
    if reply.status != 200:
        return f"status {reply.status} for a valid request"
    got = asked.golden.read(reply)
    return None if got == asked.golden.expected else f"a wrong answer: {got}\nin place of: {asked.golden.expected}"


def _shape_fault(asked: Ask, reply: Reply) -> str | None:
    if reply.status == 307 or asked.method == "HEAD" or asked.leaves_after is not None:
        return None
    if reply.status >= 400:
        schema.ErrorResponse.model_validate_json(reply.content)
    elif reply.content_type.startswith("text/event-stream"):
        return _stream_fault(reply)
    elif reply.content_type == "application/x-ndjson":
        answers = [json.loads(line) for line in reply.content.splitlines()]
        is_cut = asked.kind == "headers" and answers and answers[-1]["response"] is None
        if is_cut:  # it allowed too little time for all of its lines
            assert answers.pop()["error"]["code"] == "deadline_passed"
        statuses = {answer["response"]["status_code"] for answer in answers}
        return None if statuses <= DOCUMENTED else f"lines of a batch with statuses {statuses}"
    elif asked.path in SHAPES:
        SHAPES[asked.path].model_validate_json(reply.content)
    return None


def _stream_fault(reply: Reply) -> str | None:
    _, last = events(reply.content)[-1]
    told = [data["error"] for _, data in events(reply.content) if "error" in data]
    broken = [error for error in told if error["type"] == "server_error"]
    return f"a stream broke off: {broken}" if broken or not last else None


# -- many


async def run(app: FastAPI, asgi: ASGIApp, bank: Bank, seed: int, numbers: range, together: int, tally: Tally) -> None:
    """Ask all of them, `together` at a time. asgi: the app, or something around it."""
    warm_at = min(max(LEAST_WARM, int(len(numbers) * WARM)), len(numbers) // 2)
    started_at, weigh_at = time.monotonic(), warm_at
    with Progress(disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("fuzz", total=len(numbers))
        async with app.router.lifespan_context(app):
            for first in range(0, len(numbers), together):
                group = numbers[first : first + together]
                await _group(asgi, bank, seed, group, tally)
                progress.advance(bar, len(group))
                if tally.num_asked >= weigh_at:
                    tally.weigh()
                    weigh_at += max(1, len(numbers) // 20)
                    progress.console.print(tally.line(time.monotonic() - started_at))
                if tally.is_over:
                    break
            tally.weigh()


async def _group(app: ASGIApp, bank: Bank, seed: int, numbers: range, tally: Tally) -> None:
    asked = [request(bank, seed, number) for number in numbers]
    replies = await asyncio.gather(*(ask(app, one) for one in asked))
    for number, one, reply in zip(numbers, asked, replies, strict=True):
        fault, seconds = fault_of(one, reply), reply.seconds
        for _ in range(TRIES - 1):
            if seconds > SLOW_S:  # a busy machine, or company, may have been why; now it is alone
                seconds = min(seconds, (await ask(app, one)).seconds)
        if seconds > SLOW_S:
            fault = fault or f"slow each time: {seconds:.2f} s at best"
        tally.note(number, one, reply, seconds)
        if fault:
            tally.violations.append(f"request {number} of seed {seed}, {one.kind}: {fault}\n{one.reproduction}")


def _route(asked: Ask) -> str:
    return asked.path if asked.path in SHAPES or asked.path in ("/v1/batch", "/readyz", "/healthz") else "other"


def make_bank(seed: int) -> Bank:
    bombs()  # made now: the first that is asked must not wait
    with tempfile.TemporaryDirectory() as directory:
        return Bank(small_models(Path(directory)), seal(), seed)


def fuzz(bank: Bank, numbers: range, seed: int, together: int = 16, around: Around = lambda app: app) -> Tally:
    """Ask the requests of these numbers. around: what is planted between us and the app."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", module="PIL")
    tally = Tally()
    app, models = fuzzed_app(bank.pipelines)
    try:
        asyncio.run(run(app, around(app), bank, seed, numbers, together, tally))
    finally:
        logging.disable(logging.NOTSET)
    if models.runner.num_open:
        tally.violations.append(f"{models.runner.num_open} requests are open still, though all have their answers")
    if tally.growth_mb > MOST_GROWTH_MB:
        tally.violations.append(f"memory has grown by {tally.growth_mb:.1f} MB")
    return tally


def table(tally: Tally) -> Iterator[str]:
    """Counts by kind, by route and by status."""
    statuses = sorted({status for _, _, status in tally.counts})
    yield f"{'':24}" + "".join(f"{status or 'left':>9}" for status in statuses)
    for place in (0, 1):
        for name in sorted({key[place] for key in tally.counts}):
            row = [
                sum(n for key, n in tally.counts.items() if key[place] == name and key[2] == status)
                for status in statuses
            ]
            yield f"{name:24}" + "".join(f"{count:9}" for count in row)
    totals = [sum(n for key, n in tally.counts.items() if key[2] == status) for status in statuses]
    yield f"{'all':24}" + "".join(f"{count:9}" for count in totals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first request (default: %(default)s)")
    parser.add_argument("--together", type=int, default=16, help="requests at a time (default: %(default)s)")
    given = parser.parse_args()
    started_at = time.monotonic()
    steady_allocator()
    keep_no_primitives()
    torch.set_num_threads(1)
    bank = make_bank(given.seed)
    tally = fuzz(bank, range(given.first, given.first + given.requests), given.seed, given.together)
    print("\n".join(table(tally)))
    print(
        f"{tally.num_asked} requests, {tally.num_golden} of them valid, in {time.monotonic() - started_at:.0f} s; "
        f"slowest {tally.slowest_s:.3f} s, number {tally.slowest}, {tally.num_repeated} asked again for being slow; "
        f"memory {tally.growth_mb:+.1f} MB since {tally.warm_mb or 0.0:.0f} MB"
    )
    for violation in tally.violations:
        print("VIOLATION:", violation)
    print(f"{len(tally.violations)} violations")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
