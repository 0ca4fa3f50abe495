"""Requests that arrive at random: the continuous batch against static batches of the same engine.

    python -m benchmarks.continuous --model models/multi30k-en-de --data ../shared/data/multi30k --column en --threads 2
    python -m benchmarks.continuous                   # random weights, answers of 5 to 25 tokens

Poisson arrivals at rising rates go into an engine in this process, under three policies with the same row budget:

    continuous  a request is submitted when it arrives and joins at the next step
    shrinking   when the engine is empty, all that wait (as many as rows allow) are submitted together; nobody joins
                until the last has ended. Rows of the ended are released, and their answers leave at once
    padded      the same, but a batch keeps all its rows until its last request has ended, and its answers leave then,
                as `generate` of most libraries does

The engine has no padded batches, so their requests are given min_new_tokens = max_new_tokens = the steps that the
longest of them takes alone. An answer depends on nothing but its request, so those steps are known from running each
request alone, which is also the unloaded latency. This gives the work of a padded batch to the row and the step, with
no work added; its tokens are not the answers, which were found when each ran alone.

Time is counted, not waited for: it goes on by what each turn of the engine takes, and jumps to the next arrival where
there is nothing to do. With --threads 1 --clock cpu the turns are counted in CPU seconds of this process, so that other
work on the machine, which would decide p99, does not.

All rates and policies get the same requests in the same order, and the same gaps between arrivals up to the rate. One
JSON line per rate and policy; `row_occupancy` is the share of the row budget, over all steps, that worked on an answer
that had not ended. The last lines compare the knees: the highest rate at which p99 <= --bound x the unloaded latency,
interpolated between the last rate that held and the next; once with the unloaded p50 and once with the unloaded p99 as
that latency.
"""

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.workload import (
    finished,
    load_generator,
    make_model,
    make_requests,
    make_sources,
    of_length,
    read_column,
    read_sources,
    run,
)
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.models import SequenceGenerator


class Measured(Protocol):
    @property
    def rate(self) -> float: ...
    @property
    def p99_ms(self) -> float: ...


Policy = Callable[[deque[Request], Engine], None]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, the steps that each takes, and the gaps before them at one request a second."""

    requests: list[Request]
    steps: dict[str, int]
    gaps_s: list[float]

    def arrivals(self, rate: float) -> list[float]:
        """Seconds from the start at which each request arrives."""
        times, now = [], 0.0
        for gap in self.gaps_s:
            now += gap / rate
            times.append(now)
        return times


@dataclass(frozen=True)
class Point:
    """What one policy did at one rate."""

    rate: float  # requests a second that came
    served: float  # requests a second that were answered
    p50_ms: float
    p99_ms: float
    row_occupancy: float


# Policies


def continuous(waiting: deque[Request], engine: Engine) -> None:
    while waiting:
        engine.submit(waiting.popleft())


def shrinking(waiting: deque[Request], engine: Engine) -> None:
    for request in next_batch(waiting, engine):
        engine.submit(request)


def padded(steps: Mapping[str, int]) -> Policy:
    def admit(waiting: deque[Request], engine: Engine) -> None:
        batch = next_batch(waiting, engine)
        for request in batch:
            engine.submit(of_length(request, max(steps[other.id] for other in batch)))

    return admit


def next_batch(waiting: deque[Request], engine: Engine) -> list[Request]:
    """Those that may begin together: none before the last batch has ended."""
    if engine.has_work or not waiting:
        return []
    room = engine.max_rows // waiting[0].params.width
    return [waiting.popleft() for _ in range(min(room, len(waiting)))]


# Measuring


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = CLOCKS[options.clock]
    model, requests = load(options)
    unloaded_ms, steps = alone(model, requests, options.rows, clock)
    workload = Workload(requests, steps, gaps(len(requests)))
    capacity = len(requests) / run(Engine(model, options.rows), requests, clock).seconds
    unloaded = {"unloaded_p50_ms": percentile(unloaded_ms, 0.5), "unloaded_p99_ms": percentile(unloaded_ms, 0.99)}
    given = {"rows": options.rows, "num_beams": options.num_beams, "requests": len(requests), "clock": options.clock}
    print_line("unloaded", **given, threads=options.threads, **unloaded, offline_requests_per_second=capacity)
    policies: dict[str, Policy] = {"continuous": continuous, "shrinking": shrinking, "padded": padded(steps)}
    points: dict[str, list[Point]] = {name: [] for name in policies}
    bounds_ms = [options.bound * latency for latency in unloaded.values()]
    rate = options.start * capacity
    while rate <= options.end * capacity and not all(over(found, max(bounds_ms)) for found in points.values()):
        for name, policy in policies.items():
            if not over(points[name], max(bounds_ms)) or not over(points["continuous"], max(bounds_ms)):
                points[name].append(serve(Engine(model, options.rows), policy, workload, rate, clock))
                print_line(name, **vars(points[name][-1]))
        rate *= options.factor
    for latency, bound_ms in zip(unloaded, bounds_ms, strict=True):
        print_line("comparison", bound=f"p99 <= {options.bound} x {latency}", **compare(points, bound_ms))


def load(options: argparse.Namespace) -> tuple[SequenceGenerator, list[Request]]:
    """The model and the requests in their order of arrival; sentences come again where there are too few."""
    params = SearchParams(
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        early_stopping=False,
        length_penalty=options.length_penalty,
    )
    if options.model is None:
        requests = make_requests(make_sources(options.requests), params)
        return make_model(), [of_length(request, _answer_length(request)) for request in requests]
    model, pretrained = load_generator(options.model)
    texts = read_column(options.data, options.column, options.split)
    sources = read_sources(pretrained, texts[: options.requests])
    return model, make_requests([sources[i % len(sources)] for i in range(options.requests)], params)


def alone(
    model: SequenceGenerator, requests: Sequence[Request], rows: int, clock: Clock
) -> tuple[list[float], dict[str, int]]:
    """Each request with the engine to itself: milliseconds, and the steps it took, by id."""
    engine = Engine(model, rows)
    run(engine, requests[:2])  # warm
    runs = {request.id: run(engine, [request], clock) for request in requests}
    return [one.seconds * 1000 for one in runs.values()], {name: len(one.rows) for name, one in runs.items()}


def gaps(count: int) -> list[float]:
    """Times between Poisson arrivals at one a second, scaled so that they come at just that rate."""
    drawn = torch.empty(count).exponential_(generator=torch.Generator().manual_seed(1))
    scaled: list[float] = (drawn / drawn.mean()).tolist()
    return scaled


def serve(engine: Engine, policy: Policy, workload: Workload, rate: float, clock: Clock = time.perf_counter) -> Point:
    """Let all requests arrive at a rate and answer them."""
    coming = deque(zip(workload.arrivals(rate), workload.requests, strict=True))
    arrived = {request.id: moment for moment, request in coming}
    waiting: deque[Request] = deque()
    latencies_ms: list[float] = []
    num_steps, now = 0, 0.0
    while coming or waiting or engine.has_work:
        if not waiting and not engine.has_work:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            waiting.append(coming.popleft()[1])
        started = clock()
        policy(waiting, engine)
        events = engine.step()
        now += clock() - started
        num_steps += 1
        latencies_ms += [(now - arrived[request_id]) * 1000 for request_id, _ in finished(events)]
    useful = sum(workload.steps[request.id] * request.params.width for request in workload.requests)
    return Point(
        rate,
        len(latencies_ms) / now,
        percentile(latencies_ms, 0.5),
        percentile(latencies_ms, 0.99),
        useful / (num_steps * engine.max_rows),
    )


# Comparing


def compare(points: Mapping[str, Sequence[Point]], bound_ms: float) -> dict[str, Any]:
    """Knees of all policies, and the static ones against the continuous: throughput there, p99 at the same load."""
    knees = {name: knee(found, bound_ms) for name, found in points.items()}
    result: dict[str, Any] = {f"{name}_knee": rate for name, rate in knees.items()}
    for name in ("padded", "shrinking"):
        if knees[name] and knees["continuous"]:
            result[f"throughput_against_{name}"] = knees["continuous"] / knees[name]
        pairs = zip(points["continuous"], points[name], strict=False)  # both begin at the same rate
        held = [(ours, theirs) for ours, theirs in pairs if ours.p99_ms <= bound_ms]
        if held:
            ours, theirs = held[-1]
            result[f"p99_against_{name}_at_{ours.rate:.1f}_per_second"] = ours.p99_ms / theirs.p99_ms
    return result


def knee(points: Sequence[Measured], bound_ms: float) -> float:
    """The highest rate that held, and as far towards the next as p99 allows; 0 where none held."""
    held = [index for index, point in enumerate(points) if point.p99_ms <= bound_ms]
    if not held:
        return 0.0
    last, *beyond = points[held[-1] :]
    if not beyond:
        return last.rate
    share = (bound_ms - last.p99_ms) / (beyond[0].p99_ms - last.p99_ms)
    return last.rate + share * (beyond[0].rate - last.rate)


def over(points: Sequence[Point], bound_ms: float) -> bool:
    """Whether the knee has been passed: two rates in succession, since one may be a hiccup of the machine."""
    return len(points) > 1 and all(point.p99_ms > bound_ms for point in points[-2:])


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that so large a share of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def print_line(policy: str, **fields: Any) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
    print(json.dumps({"benchmark": "continuous", "policy": policy, **rounded}), flush=True)


def _answer_length(request: Request) -> int:
    """Random weights never end an answer; a translation is about as long as its source."""
    return 5 if request.inputs is None else len(request.inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; random weights without it")
    parser.add_argument("--data", type=Path, help="folder or file of the test set")
    parser.add_argument("--column", default="en", help="of the sources")
    parser.add_argument("--split", default="test")
    parser.add_argument("--requests", type=int, default=400, help="at each rate")
    parser.add_argument("--rows", type=int, default=160, help="row budget of the engine")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--length-penalty", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a shared machine, with --threads 1")
    parser.add_argument("--bound", type=float, default=4.0, help="p99 may be so many times the unloaded latency")
    parser.add_argument("--start", type=float, default=0.1, help="first rate, as a share of the offline throughput")
    parser.add_argument("--end", type=float, default=1.5, help="last rate, as a share of the offline throughput")
    parser.add_argument("--factor", type=float, default=1.2, help="from one rate to the next")
    return parser


if __name__ == "__main__":
    main()
