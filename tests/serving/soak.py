"""A service under load for a long time: does its memory grow?

    python -m tests.serving.soak [--minutes 30] [--load 0.7] [--plant-leak BYTES_PER_REQUEST]

A real service, over Ray and HTTP, serves small models to a mix of clients: some ask for labels, some for beams,
streams, batches, states; some leave before their answer, some ask for nonsense. First it is asked as fast as it
answers, which measures its capacity; then at moments that come by chance, `--load` of that, whether it keeps up or not.
Where others use the machine too, ask for less: a service that does not keep up refuses requests, which is a fault here.
Meanwhile the memory of its replica and of Ray's proxy is read every few seconds.

**When memory counts as growing.** Only the second half is looked at: caches, compiled kernels and the allocator's own
pools fill in the first. Resident memory moves in steps and saw-teeth, and neighbouring samples are alike, so a fitted
line with the usual standard error would find leaks in noise. So the second half is cut into ten parts, and of each only
the least that was held counts: a leak raises that floor, a peak does not, and parts are long enough to be independent
of each other. The slope is Theil and Sen's, the median over all pairs of floors, and its 99 % interval is theirs too,
from the ranks of these pairs: it asks for no distribution. At 99 % one step amid noise is no slope, which it would be
at 95 %: a moment in which the machine is busy elsewhere and requests pile up leaves one. Memory grows where the lower
end of the interval is above 1 MB in 10 minutes: less would take a week to fill 1 GB. Where the interval is so wide that
10 MB in 10 minutes could hide in it, nobody can tell, and that fails too.

glibc gets one arena and a fixed bound for large blocks, for holes between an arena's blocks grow for the first ten
thousands of requests (see fuzz.steady_allocator).

Exit status 1 where memory grows, or an answer is wrong (they are compared with the library's), or does not come, or has
a status that is not right for its kind. No 5xx is right: 503 says that a service ends, and this one ends when all have
their answers. One in a hundred may be refused because the machine is busy (408, 429). With `--plant-leak` the service
keeps bytes of each request, and the exit status is 1 unless its replica is found to grow while its answers are right.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.progress import Progress

from benchmarks.running import Running, running

from .events import events
from .golden import FIELDS, PATHS, TEXTS, Golden
from .leaking import LEAK_BYTES
from .model_directories import save_all

KEY = "a key that only the soak knows"
ALLOWED_MB = 1.0  # in 10 minutes
VISIBLE_MB = 10.0  # in 10 minutes: what must be seen if it is there
BLOCKS = 10  # parts of the second half
Z = 2.576  # standard deviations of a 99 % interval
CAPACITY_S, WARM_S, AT_ONCE = 15.0, 10.0, 8
SAMPLE_S = 2.0
MOST_OPEN = 500  # requests without an answer, after which a new one is not begun: the service does not keep up
REPLICA, PROXY = WATCHED = ("ServeReplica", "ProxyActor")  # as Ray names its processes


# -- the rule


@dataclass(frozen=True)
class Trend:
    """A slope in MB per 10 minutes, and its 99 % interval."""

    slope: float
    low: float
    high: float

    @property
    def grows(self) -> bool:
        return self.low > ALLOWED_MB

    @property
    def is_blurred(self) -> bool:
        return self.high - self.low > 2 * VISIBLE_MB

    def __str__(self) -> str:
        verdict = "grows" if self.grows else "nobody can tell" if self.is_blurred else "within noise"
        return f"{self.slope:+.2f} MB in 10 minutes ({self.low:+.2f} to {self.high:+.2f}): {verdict}"


def trend(seconds: Sequence[float], megabytes: Sequence[float]) -> Trend:
    """Of the floors of the second half."""
    half = len(seconds) // 2
    parts = np.array_split(np.arange(half, len(seconds)), min(BLOCKS, len(seconds) - half))
    x = np.asarray([np.mean(np.take(seconds, part)) / 600.0 for part in parts])
    y = np.asarray([np.min(np.take(megabytes, part)) for part in parts])
    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    # How far from the middle the ends of the interval are, in ranks: Sen (1968), by Kendall's variance.
    n = len(x)
    ranks = Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0)
    low, high = math.floor((len(slopes) - ranks) / 2), math.ceil((len(slopes) + ranks) / 2)
    return Trend(float(np.median(slopes)), float(slopes[max(0, low - 1)]), float(slopes[min(len(slopes) - 1, high)]))


# -- the service


@contextlib.contextmanager
def leaking(leak_bytes: int) -> Iterator[tuple[Running, Golden]]:
    """The service, which keeps so many bytes of each request, and what is right."""
    environment = {"SEQMODELS_API_KEYS": KEY, LEAK_BYTES: str(leak_bytes)}
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    with tempfile.TemporaryDirectory() as directory:
        models = save_all(Path(directory))
        served = {name: models[name] for name in PATHS}
        golden = Golden({name: [directory] for name, directory in served.items()})
        with running(served, environment, "tests.serving.leaking" if leak_bytes else "serving") as service:
            yield service, golden


def memory_of(service: Running) -> dict[str, float]:
    """MB that each watched process holds; several of a name as one. Raises RuntimeError where there is none."""
    held = {name: service.resident_bytes(f"ray::{name}") / 1e6 for name in WATCHED}
    if missing := [name for name, megabytes in held.items() if not megabytes]:
        raise RuntimeError(f"no process is called {', '.join(missing)}")
    return held


# -- the clients


@dataclass
class Soak:
    """What came of all requests. states: of answers, to go on from."""

    client: httpx.AsyncClient
    golden: Golden
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    states: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    async def one(self) -> None:
        """One client, of any kind."""
        (ask,) = self.chance.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
        started_at = time.monotonic()
        try:
            status = await ask(self)
        except httpx.HTTPError as error:
            status = type(error).__name__
        self.outcomes[f"{ask.__name__} {status}"] += 1
        self.seconds.append(time.monotonic() - started_at)

    @property
    def text(self) -> str:
        return self.chance.choice(TEXTS)

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/{path}", json=body)

    async def ask(self, name: str, inputs: str | list[str]) -> str:
        """The status of a model's answer, or that it is wrong."""
        response = await self.post(PATHS[name], {"model": name, "inputs": inputs, **FIELDS[name]})
        if response.status_code != 200:
            return str(response.status_code)
        return "200" if self.golden.is_right(name, inputs, response.json()) else "wrong"


async def classify(soak: Soak) -> str:
    return await soak.ask("mood", [soak.text, soak.text])


async def tag(soak: Soak) -> str:
    return await soak.ask("names", soak.text)


async def translate(soak: Soak) -> str:
    return await soak.ask("en-de", soak.text)


async def stream(soak: Soak) -> str:
    text = soak.text
    response = await soak.post("generate", {"inputs": text, "stream": True, **FIELDS["story"]})
    if response.status_code != 200:
        return str(response.status_code)
    *_, last = events(response.content)
    return "200" if last[0] == "answer" and soak.golden.is_right("story", text, last[1]) else "wrong"


async def leave(soak: Soak) -> str:
    """With the first piece of a long stream, or before the answer to a long request."""
    body = {"inputs": soak.text, "stream": soak.chance.random() < 0.5, "max_new_tokens": 200, "min_new_tokens": 200}
    with contextlib.suppress(httpx.TimeoutException):
        async with soak.client.stream("POST", "/v1/generate", json=body, timeout=0.1) as response:
            if response.status_code != 200:
                return str(response.status_code)
            async for piece in response.aiter_bytes():
                return "broken" if b"event: error" in piece else "left"
    return "left"


async def resume(soak: Soak) -> str:
    """Go on from a state, or ask for the first."""
    body: dict[str, Any] = {"inputs": soak.text, "max_new_tokens": 5, "return_state": True}
    if soak.states:
        body["state"] = soak.chance.choice(soak.states)
    response = await soak.post("generate", body)
    if response.status_code == 200 and len(soak.states) < 50:
        soak.states.append(response.json()["results"][0]["sequences"][0]["state"])
    return str(response.status_code)


async def batch(soak: Soak) -> str:
    """Four lines, and one for a route that there is not."""
    texts = [soak.text for _ in range(4)]
    lines: list[Any] = [{"url": "/v1/classify", "body": {"model": "mood", "inputs": text}} for text in texts]
    content = b"\n".join(json.dumps(line).encode() for line in [*lines, {"url": "/v1/none"}])
    response = await soak.client.post("/v1/batch", content=content, headers={"content-type": "application/x-ndjson"})
    if response.status_code != 200:
        return str(response.status_code)
    answers = [json.loads(line)["response"] for line in response.content.splitlines()]
    if [answer["status_code"] for answer in answers] != [200] * 4 + [400]:
        return "broken"
    pairs = zip(texts, answers[:4], strict=True)
    return "200" if all(soak.golden.is_right("mood", text, answer["body"]) for text, answer in pairs) else "wrong"


async def nonsense(soak: Soak) -> str:
    asked: list[tuple[str, Any]] = [
        ("classify", {"inputs": ""}), ("tag", {"inputs": [None]}), ("generate", {"inputs": "x", "num_beams": 99}),
        ("generate", {"state": "x"}), ("translate", []), ("generate", 7),
    ]  # fmt: skip
    return str((await soak.post(*soak.chance.choice(asked))).status_code)


KINDS: list[tuple[Callable[[Soak], Awaitable[str]], int]] = [
    (classify, 30), (tag, 10), (translate, 15), (stream, 15), (leave, 5), (resume, 10), (batch, 5), (nonsense, 10),
]  # fmt: skip
RIGHT = {f"{kind.__name__} 200" for kind, _ in KINDS} - {"leave 200", "nonsense 200"}
RIGHT |= {"leave left", "nonsense 400", "nonsense 422"}
BUSY = (" 408", " 429", "not begun")


async def capacity(soak: Soak, seconds: float) -> float:
    """Requests a second, from clients that each ask again as soon as they have an answer."""
    until, count = time.monotonic() + seconds, 0

    async def go_on() -> None:
        nonlocal count
        while time.monotonic() < until:
            await soak.one()
            count += 1

    await asyncio.gather(*(go_on() for _ in range(AT_ONCE)))
    return count / seconds


async def load(soak: Soak, rate: float, seconds: float) -> None:
    """Requests at moments that come by chance, `rate` a second on average, whether others have their answers or not."""
    began_at = time.monotonic()
    begin_at = began_at
    async with asyncio.TaskGroup() as clients:
        num_open = 0

        async def one() -> None:
            nonlocal num_open
            num_open += 1
            await soak.one()
            num_open -= 1

        while begin_at < began_at + seconds:
            await asyncio.sleep(max(0.0, begin_at - time.monotonic()))
            begin_at += soak.chance.expovariate(rate)
            if num_open < MOST_OPEN:
                clients.create_task(one())
            else:
                soak.outcomes["not begun"] += 1


Samples = list[tuple[float, dict[str, float]]]


async def watch(service: Running, samples: Samples, seconds: float) -> None:
    began_at = time.monotonic()
    with Progress(disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("soak", total=seconds)
        while (now := time.monotonic() - began_at) < seconds:
            samples.append((now, await asyncio.to_thread(memory_of, service)))
            progress.update(bar, completed=now)
            await asyncio.sleep(SAMPLE_S)


@dataclass(frozen=True)
class Report:
    """capacity: requests a second. trends: by process."""

    capacity: float
    samples: Samples
    outcomes: Counter[str]
    seconds: Sequence[float]
    trends: dict[str, Trend]

    @property
    def faults(self) -> list[str]:
        found = [f"{name}: {trend}" for name, trend in self.trends.items() if trend.grows or trend.is_blurred]
        return found + self.failures

    @property
    def failures(self) -> list[str]:
        """Of requests."""
        found = [f"{name}: {n}" for name, n in self.outcomes.items() if name not in RIGHT and not name.endswith(BUSY)]
        busy = sum(n for name, n in self.outcomes.items() if name.endswith(BUSY))
        if busy > self.outcomes.total() / 100:
            found.append(f"requests for which it was too busy: {busy}")
        return found

    def __str__(self) -> str:
        lines = [f"{self.outcomes.total()} requests, capacity {self.capacity:.0f} a second"]
        median, late = np.quantile(self.seconds, [0.5, 0.99])
        lines.append(f"seconds to an answer: median {median:.3f}, 99 % within {late:.3f}")
        lines += [f"  {name}: {count}" for name, count in sorted(self.outcomes.items())]
        for name, trend in self.trends.items():
            first, last = self.samples[0][1][name], self.samples[-1][1][name]
            lines.append(f"{name}: {first:.1f} MB at first, {last:.1f} MB at last, second half {trend}")
        return "\n".join(lines)


async def soak(service: Running, golden: Golden, minutes: float, share: float, seed: int = 0) -> Report:
    """share: of the capacity."""
    headers, limits = {"authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=MOST_OPEN)
    async with httpx.AsyncClient(base_url=service.address, headers=headers, timeout=30, limits=limits) as client:
        soak = Soak(client, golden, random.Random(seed))
        await capacity(soak, WARM_S)
        most = await capacity(soak, CAPACITY_S)
        print(f"capacity {most:.0f} requests a second; now {share:.0%} of it for {minutes:g} minutes", flush=True)
        soak.seconds.clear()
        samples: Samples = []
        await asyncio.gather(load(soak, share * most, 60 * minutes), watch(service, samples, 60 * minutes))
    moments = [moment for moment, _ in samples]
    trends = {name: trend(moments, [held[name] for _, held in samples]) for name in WATCHED}
    return Report(most, samples, soak.outcomes, soak.seconds, trends)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity (default: %(default)s)")
    parser.add_argument("--plant-leak", type=int, default=0, metavar="BYTES", help="kept of each request")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--samples", type=Path, help="a file for all samples, a line of JSON each")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    with leaking(given.plant_leak) as (service, golden):
        report = asyncio.run(soak(service, golden, given.minutes, given.load, given.seed))
    if given.samples:
        given.samples.write_text("".join(json.dumps(sample) + "\n" for sample in report.samples))
    print(report)
    print("\n".join(f"FAULT: {fault}" for fault in report.faults) or "no fault")
    if given.plant_leak:
        return 0 if report.trends[REPLICA].grows and not report.failures else 1
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
