"""Pictures and clips that mean harm, or are none: each must get a clear 4xx at once, and cost next to no memory.

    python -m tests.serving.hostile_images [--count 1000] [--seed 0] [--first 0]

The app runs in this process over small real models. Each file is sent alone, as a raw body, in base64, in a list beside
a good picture, as a frame beside a good one, or as an animated file. Damage leaves some files whole enough to be drawn:
those may be answered. Memory is the largest resident size while one is answered, less that before. Time is that of the
processor, since others may use it too.

Exit status 1 after a violation; each is told with what makes it again: `--seed S --first NUMBER --count 1`.
"""

import argparse
import asyncio
import base64
import ctypes
import gc
import json
import logging
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from starlette.types import ASGIApp

from seqmodels.pipeline import Pipeline
from serving import schema

from .conftest import app_over
from .fuzz import SLOW_S, ask
from .fuzz_valid import Ask, Reply
from .hostile_files import GOOD_PICTURE, KINDS, NEVER_DRAWN
from .model_directories import save_all

MOST_EXTRA_MB = 200.0
HANGS_S = 10.0  # on a machine that others may keep busy
CODES = {"unsupported_input", "invalid_image", "limit_exceeded", "too_long", "empty"}
WAYS = ("raw body", "picture", "list of pictures", "list of frames", "animated file")


@dataclass
class Tally:
    """What came back. counts: by kind and code, which is "answered" where a file could be drawn."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    largest_mb: float = 0.0
    largest: str = ""
    violations: list[str] = field(default_factory=list)


def turn(number: int) -> tuple[str, str]:
    """A kind of harm, and a way to send it."""
    return list(KINDS)[number % len(KINDS)], WAYS[number // len(KINDS) % len(WAYS)]


def asked(kind: str, way: str, data: bytes) -> Ask:
    encoded, good = base64.b64encode(data).decode(), base64.b64encode(GOOD_PICTURE).decode()
    content_type, content = "image/png", data
    if way != "raw body":
        inputs = {
            "picture": {"image": encoded},
            "list of pictures": [{"image": good}, {"image": encoded}],
            "list of frames": {"frames": [good, encoded]},
            "animated file": {"frames": encoded},
        }[way]
        content_type, content = "application/json", json.dumps({"inputs": inputs}).encode()
    path = "/v1/tag" if "frame" in way or "animated" in way else "/v1/caption"
    headers = ((b"content-type", content_type.encode()), (b"host", b"127.0.0.1"))
    return Ask(kind, "POST", path, b"", headers, content)


def fault_of(kind: str, reply: Reply) -> str | None:
    """What is wrong with an answer."""
    if reply.error is not None:
        return f"it raised {reply.error!r}"
    if reply.status == 200:
        return "it was answered" if kind in NEVER_DRAWN else None
    if not 400 <= reply.status < 500:
        return f"status {reply.status}"
    error = error_of(reply)
    if error.type != "invalid_request_error" or error.code not in CODES or error.param is None:
        return f"an error of another kind: {error}"
    return None if len(error.message) > 20 else f"an error that says nothing: {error}"


def error_of(reply: Reply) -> schema.ErrorDetail:
    return schema.ErrorResponse.model_validate_json(reply.content).error


class Peak:
    """The most memory that this process has had at a time, since `begin`."""

    def begin(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self._before = _status_mb("VmRSS")

    def extra_mb(self) -> float:
        return _status_mb("VmHWM") - self._before


def _status_mb(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


async def _send(app: ASGIApp, seed: int, numbers: range, tally: Tally) -> None:
    peak = Peak()
    for number in numbers:
        kind, way = turn(number)
        data = KINDS[kind](random.Random(f"{seed} {number}"))
        request = asked(kind, way, data)
        peak.begin()
        began_s = time.process_time()
        reply = await ask(app, request)
        busy_s, extra_mb = time.process_time() - began_s, peak.extra_mb()
        if fault := fault_of(kind, reply) or _cost_fault(reply.seconds, busy_s, extra_mb):
            tally.violations.append(f"file {number} of seed {seed}, {kind}, {way}, {len(data)} bytes: {fault}")
        code = "answered" if reply.status == 200 else error_of(reply).code if reply.status < 500 else "broken"
        tally.counts[kind, code] += 1
        if busy_s > tally.slowest_s:
            tally.slowest_s, tally.slowest = busy_s, f"number {number}, {kind}, {way}"
        if extra_mb > tally.largest_mb:
            tally.largest_mb, tally.largest = extra_mb, f"number {number}, {kind}, {way}"


def _cost_fault(seconds: float, busy_s: float, extra_mb: float) -> str | None:
    if seconds > HANGS_S:
        return f"no answer for {seconds:.0f} s"
    if busy_s > SLOW_S:
        return f"{busy_s:.2f} s of work"
    return f"{extra_mb:.0f} MB more memory" if extra_mb > MOST_EXTRA_MB else None


def send_all(numbers: range, seed: int) -> Tally:
    """Send the files of these numbers, one at a time."""
    with tempfile.TemporaryDirectory() as directory:
        saved = save_all(Path(directory))
        pipelines = {name: Pipeline.from_pretrained(saved[name]) for name in ("describe", "motion")}
    app, models = app_over(pipelines)
    tally = Tally()

    async def run() -> None:
        async with app.router.lifespan_context(app):
            for way in WAYS:  # what is made once is made now
                await ask(app, asked("good", way, GOOD_PICTURE))
            gc.freeze()  # it is there to stay, and takes long to look through
            await _send(app, seed, numbers, tally)

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged files
            asyncio.run(run())
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)
    if models.runner.num_open:
        tally.violations.append(f"{models.runner.num_open} requests are open still")
    return tally


def table(tally: Tally) -> Iterator[str]:
    """Counts by kind and by code."""
    codes = sorted({code for _, code in tally.counts})
    yield f"{'':20}" + "".join(f"{code:>19}" for code in codes)
    for kind in KINDS:
        yield f"{kind:20}" + "".join(f"{tally.counts[kind, code]:19}" for code in codes)
    totals = [sum(count for (_, other), count in tally.counts.items() if other == code) for code in codes]
    yield f"{'all':20}" + "".join(f"{total:19}" for total in totals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tally = send_all(range(given.first, given.first + given.count), given.seed)
    print("\n".join(table(tally)))
    print(
        f"{given.count} files; most work {tally.slowest_s:.2f} s ({tally.slowest}); "
        f"most extra memory {tally.largest_mb:.0f} MB ({tally.largest})"
    )
    for violation in tally.violations:
        print(f"VIOLATION {violation}")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
