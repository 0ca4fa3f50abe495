"""What a step of the engine costs as requests queue up, and as outputs grow, or may grow: it should depend on neither.

    python -m benchmarks.step_cost --plot docs/step_cost.png

A model of a Multi30k translator's size with random weights. Eight requests with beam 5 run all the time, without rules
that look at their history. First with more and more requests waiting behind them, then with outputs of more and more
tokens, then with more and more of them allowed (max_new_tokens) and few written. One JSON line per point: the median
time of --steps steps, in milliseconds, in which nobody joins or leaves.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.workload import make_model, make_requests, make_sources, of_length
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.stepper import Stepper

RUNNING, BEAMS = 8, 5
Points = list[tuple[int, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stepper = Stepper(make_model())
    measured = {"waiting": by_waiting(stepper, options.waiting, options.steps)}
    measured["length"] = by_length(stepper, options.lengths, options.steps)
    measured["max_new_tokens"] = by_room(stepper, options.rooms, options.steps)
    for name, points in measured.items():
        for value, milliseconds in points:
            line = {"benchmark": "step_cost", "threads": options.threads, name: value, "step_ms": milliseconds}
            print(json.dumps(line), flush=True)
    if options.plot:
        plot(measured, options.plot)


def by_waiting(stepper: Stepper, counts: Sequence[int], steps: int) -> Points:
    """The time of a step while so many requests wait."""
    points = []
    for count in counts:
        engine = Engine(stepper, max_rows=RUNNING * BEAMS)
        for request in requests_of(RUNNING + count, steps + 20):
            engine.submit(request)
        turn(engine, 5)
        points.append((count, milliseconds(engine, steps)))
    return points


def by_length(stepper: Stepper, lengths: Sequence[int], steps: int) -> Points:
    """The time of a step when so many tokens have been generated."""
    engine = Engine(stepper, max_rows=RUNNING * BEAMS)
    for request in requests_of(RUNNING, max(lengths) + 2 * steps):
        engine.submit(request)
    points, done = [], 0
    for length in sorted(lengths):
        turn(engine, length - done)
        points.append((length, milliseconds(engine, steps)))
        done = length + steps
    return points


def by_room(stepper: Stepper, rooms: Sequence[int], steps: int) -> Points:
    """The time of a step when so many tokens may be generated, and few have been."""
    points = []
    for room in rooms:
        engine = Engine(stepper, max_rows=RUNNING * BEAMS)
        for request in requests_of(RUNNING, room):
            engine.submit(request)
        turn(engine, 5)
        points.append((room, milliseconds(engine, steps)))
    return points


def requests_of(count: int, tokens: int) -> list[Request]:
    params = SearchParams(num_beams=BEAMS, early_stopping=False, length_penalty=0.0)
    return [of_length(request, tokens) for request in make_requests(make_sources(count), params)]


def turn(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.step()


def milliseconds(engine: Engine, steps: int) -> float:
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3)


def plot(measured: dict[str, Points], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    labels = {"waiting": "requests that wait", "length": "tokens generated", "max_new_tokens": "tokens allowed"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3), sharey=True)
    for axis, (name, points) in zip(axes, measured.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set_xlabel(labels[name])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("one step, ms")
    axes[0].set_ylim(0, 1.15 * max(cost for points in measured.values() for _, cost in points))
    figure.suptitle(f"{RUNNING} requests with beam {BEAMS}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="timed at each point")
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 100, 1000, 5000, 10000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 100, 250, 500, 750, 1000])
    parser.add_argument("--rooms", type=int, nargs="+", default=[100, 1000, 5000, 10000])
    parser.add_argument("--plot", type=Path, help="where to draw the curves, as a PNG")
    return parser


if __name__ == "__main__":
    main()
