"""The service over HTTP: how fast, against what it does offline, what Ray Serve alone can do, and the stock recipe.

    python -m benchmarks.serve --translate models/multi30k-en-de --translate-data ../shared/data/multi30k \
        --classify models/sst2 --classify-data ../shared/data/sst2 --generate models/tinyshakespeare --plot serve.svg
    python -m benchmarks.serve                                  # the models of `make demo`

Each system runs alone, in processes of its own, with one replica of one thread; the load comes from this process, on
the same machine. Every answer of the service is compared with that of the pipeline offline, and only right ones count;
of the stock recipe each must be a text (a test compares its search with the engine's). One JSON line per result:

    offline   the pipeline in this process, one thread, all sentences at once
    closed    so many clients who each wait for their answer; `of_offline` compares sentences a second, `of_empty`
              requests a second with those of an endpoint that does nothing; `replica_ms` is what a request costs the
              replica, in milliseconds of a core
    sweep     Poisson arrivals at rising rates. `goodput`: right answers a second within --within of their workload
              (of a stream: whose first piece came within it); p99_ms is over all, and one that failed never came
    knee      the highest rate at which p99 keeps within that, interpolated
    overload  ten times the knee, each request saying that it can wait so long: goodput as a share of the sweep's best,
              growth of the replica's memory, and how long after the end something was still not right
    stock     how many requests a second our p99 and that of the stock recipe (see benchmarks/stock) allow, for several
              bounds of p99, and how many times as many ours are

Compare ratios within one run, since machines differ and are shared.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.continuous import knee, percentile
from benchmarks.load import Ask, Load, Outcome
from benchmarks.running import Running, running, started
from benchmarks.workload import read_column
from seqmodels.pipeline import Pipeline

SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)  # of what closed loops reached
BOUNDS_S = (0.25, 0.5, 1.0)  # of p99, at which the stock recipe is compared
CLIENTS = 48
LIST = 16  # sentences in one request
OVERLOAD = 10
REPLICA = "ray::ServeReplica"
NUM_BEAMS, MAX_NEW_TOKENS, WRITTEN = 5, 60, 64
PROMPTS = ["the ", "a good ", "when ", "of all ", "in ", "he said ", "there was ", "my lord, "]


@dataclass(frozen=True)
class Workload:
    """Sentences for one endpoint and their right answers. within_s: an answer is of use until then."""

    name: str
    path: str
    fields: dict[str, Any]
    inputs: list[str]
    answers: list[Any]
    within_s: float

    def asks(self, size: int = 1) -> list[Ask]:
        """Requests of so many sentences each; one at a time they are not in a list."""
        asks = []
        for at in range(0, len(self.inputs) - size + 1, size):
            inputs = self.inputs[at : at + size]
            body = {"model": self.name, "inputs": inputs if size > 1 else inputs[0], **self.fields}
            is_right = _same(self.answers[at : at + size], streamed="stream" in self.fields)
            asks.append(Ask(self.path, json.dumps(body).encode(), is_right, size))
        return asks


@dataclass(frozen=True)
class Point:
    """What came of one rate."""

    rate: float
    goodput: float
    p50_ms: float
    p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    statuses: dict[int, int]
    wrong: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    workloads, offline = load(options)
    for name, rate in offline.items():
        say("offline", name, sentences_per_second=rate)
    empty = measure_empty(options)
    points: dict[str, list[Point]] = {}
    models = {name: str(getattr(options, name).resolve()) for name in workloads}
    with running(models, profile=options.profile, max_requests=options.max_requests) as service:
        for workload in workloads.values():
            singles = closed(workload, service, options, offline[workload.name], empty)
            points[workload.name] = sweep(workload, service.address, singles, options, "ours")
        for workload in workloads.values():
            if workload.name != "generate":
                overload(workload, service, points[workload.name], options)
    translate = workloads["translate"]
    with stock(str(options.translate.resolve()), options) as system:
        asks = stock_asks(translate)
        reached = rate_of(Load(system.address).closed_loop(asks, CLIENTS, options.seconds))
        points["stock"] = sweep(translate, system.address, reached, options, "stock", asks)
    for bound_s in BOUNDS_S:
        ours, theirs = (knee(points[name], bound_s * 1000) for name in ("translate", "stock"))
        say(
            "stock", "translate", within_s=bound_s, ours=ours, stock=theirs, times=ours / theirs if theirs else math.inf
        )
    if options.plot:
        plot(points, options.plot)


# Workloads


def load(options: argparse.Namespace) -> tuple[dict[str, Workload], dict[str, float]]:
    """Each with its right answers, which the pipeline gives offline, and the sentences a second that it gives."""
    search = {"num_beams": NUM_BEAMS, "max_new_tokens": MAX_NEW_TOKENS, "early_stopping": False}
    written = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": True, "seed": 1}
    given = {
        "translate": ("/v1/translate", search, options.translate_data, "en", "test"),
        "classify": ("/v1/classify", {}, options.classify_data, "sentence", "validation"),
        "generate": ("/v1/generate", written, None, "", ""),
    }
    workloads, offline = {}, {}
    for name, (path, fields, data, column, split) in given.items():
        texts = read_column(data, column, split) if data else generated(name)
        texts = texts[: options.sentences]
        pipeline = Pipeline.from_pretrained(getattr(options, name))
        pipeline(texts[:32], **fields)  # warm
        began = time.monotonic()
        results = pipeline(texts, **fields)
        offline[name] = len(texts) / (time.monotonic() - began)
        streamed = {"stream": True} if name == "generate" else {}
        within = getattr(options, f"{name}_within")
        workloads[name] = Workload(name, path, {**fields, **streamed}, texts, results, within)
    return workloads, offline


def generated(name: str) -> list[str]:
    """Sentences of the demo's own data, or beginnings to go on from."""
    from training.data.generated import generate

    if name == "generate":
        return PROMPTS * 25
    task = {"translate": "numbers-en-fr", "classify": "sentiment"}[name]
    return [str(row.input) for row in generate(task)["test"]]


def _same(answers: Sequence[Any], streamed: bool) -> Callable[[bytes], bool]:
    def is_right(body: bytes) -> bool:
        if streamed:
            body = body.rpartition(b"\n\nevent: answer\ndata: ")[2]
        return bool(json.loads(body)["results"] == list(answers))

    return is_right


def stock_asks(workload: Workload) -> list[Ask]:
    """The same sentences for an endpoint that gives the likeliest text alone."""
    return [
        Ask("/", json.dumps({"inputs": text}).encode(), lambda body: "text" in json.loads(body))
        for text in workload.inputs
    ]


# Systems


@contextmanager
def stock(what: str, options: argparse.Namespace) -> Iterator[Running]:
    """`empty`, or a model directory for the stock recipe, once it answers."""
    more = ["--profile", options.profile, "--batch", str(options.stock_batch)]
    with started("benchmarks.stock", what, *more) as system:
        system.wait_until_it_says("ready")
        yield system


# Measuring


def measure_empty(options: argparse.Namespace) -> float:
    """Requests a second of an endpoint that does nothing."""
    with stock("empty", options) as system:
        asks = [Ask("/", b'{"inputs": "nothing"}', lambda body: body == b"{}")]
        outcomes, replica_ms = ask(system, asks, CLIENTS, options.seconds)
    rate = rate_of(outcomes)
    say("closed", "empty", clients=CLIENTS, requests_per_second=rate, replica_ms=replica_ms)
    return rate


def ask(system: Running, asks: list[Ask], clients: int, seconds: float) -> tuple[list[Outcome], float]:
    """What became of the requests of so many clients once the system was warm, and the milliseconds of a core that each
    cost the replica."""
    load = Load(system.address)
    load.closed_loop(asks, clients, 2)  # warm
    before = system.processor_seconds(REPLICA)
    outcomes = load.closed_loop(asks, clients, seconds)
    return outcomes, 1000 * (system.processor_seconds(REPLICA) - before) / len(outcomes)


def closed(workload: Workload, service: Running, options: argparse.Namespace, offline: float, empty: float) -> float:
    """What clients reach that wait for their answers, with lists too; returned is that of one sentence a request."""
    reached = []
    for size, clients in ((1, CLIENTS), (LIST, CLIENTS // LIST + 1)):
        asks = workload.asks(size)
        if "stream" in workload.fields and size > 1:
            continue
        outcomes, replica_ms = ask(service, asks, clients, options.seconds)
        reached.append(rate_of(outcomes))
        ratios = {"of_offline": reached[-1] / offline}
        if size == 1:
            ratios["of_empty"] = reached[-1] / empty
        wrong = [outcome for outcome in outcomes if not outcome.is_right]
        say(
            "closed",
            workload.name,
            clients=clients,
            list=size,
            sentences_per_second=reached[-1],
            **ratios,
            replica_ms=replica_ms,
            **faults(wrong),
        )
    return reached[0]


def faults(wrong: Sequence[Outcome]) -> dict[str, Any]:
    return {"wrong": len(wrong), **({"for_example": wrong[0].told, "status": wrong[0].status} if wrong else {})}


def rate_of(outcomes: Sequence[Outcome]) -> float:
    """Right sentences a second, from the first request to the last answer."""
    return sum(one.inputs for one in outcomes if one.is_right) / max(one.due_s + one.seconds for one in outcomes)


def sweep(
    workload: Workload,
    address: str,
    reached: float,
    options: argparse.Namespace,
    system: str,
    asks: list[Ask] | None = None,
) -> list[Point]:
    """Rising rates, until p99 has twice been over the bound."""
    points: list[Point] = []
    for share in SHARES:
        outcomes = Load(address).open_loop(asks or workload.asks(), share * reached, options.seconds)
        points.append(point(outcomes, share * reached, options.seconds, workload))
        say("sweep", workload.name, system=system, **asdict(points[-1]))
        if all(one.p99_ms > workload.within_s * 1000 for one in points[-2:]) and len(points) > 1:
            break
    say("knee", workload.name, system=system, within_s=workload.within_s, rate=knee(points, workload.within_s * 1000))
    return points


def point(outcomes: Sequence[Outcome], rate: float, seconds: float, workload: Workload) -> Point:
    """What counts in time is the whole answer, or of a stream its first piece."""
    first = [1000 * one.first_byte_s if one.is_right else math.inf for one in outcomes]
    whole = [1000 * one.seconds if one.is_right else math.inf for one in outcomes]
    counted = first if "stream" in workload.fields else whole
    statuses = dict(
        sorted((status, sum(one.status == status for one in outcomes)) for status in {one.status for one in outcomes})
    )
    return Point(
        rate=rate,
        goodput=sum(ms <= 1000 * workload.within_s for ms in counted) / seconds,
        p50_ms=percentile(counted, 0.5),
        p99_ms=percentile(counted, 0.99),
        first_p50_ms=percentile(first, 0.5),
        first_p99_ms=percentile(first, 0.99),
        statuses=statuses,
        wrong=sum(one.status == 200 and not one.is_right for one in outcomes),
    )


def overload(workload: Workload, service: Running, points: Sequence[Point], options: argparse.Namespace) -> None:
    """Ten times the knee, then half of it: what is answered in time, what it costs, how soon all is well again."""
    at = knee(points, workload.within_s * 1000)
    best = max(one.goodput for one in points)
    load = Load(service.address, timeout_s=workload.within_s)
    before = replica_mib(service)
    during = point(
        load.open_loop(workload.asks(), OVERLOAD * at, options.seconds), OVERLOAD * at, options.seconds, workload
    )
    after = load.open_loop(workload.asks(), at / 2, options.seconds)
    late = [one.due_s for one in after if not one.is_right or one.seconds > workload.within_s]
    say(
        "overload",
        workload.name,
        offered=OVERLOAD * at,
        goodput=during.goodput,
        of_best=during.goodput / best,
        p99_ms=during.p99_ms,
        statuses=during.statuses,
        wrong=during.wrong,
        memory_before_mib=before,
        memory_after_mib=replica_mib(service),
        recovery_s=max(late, default=0.0),
    )


def replica_mib(service: Running) -> float:
    return service.resident_bytes(REPLICA) / 2**20


def say(result: str, workload: str, **fields: Any) -> None:
    told = {name: _told(value) if isinstance(value, float) else value for name, value in fields.items()}
    line = {"benchmark": "serve", "result": result, "workload": workload, **told}
    print(json.dumps(line, allow_nan=False), flush=True)


def _told(value: float) -> float | None:
    """JSON has no word for what is infinite, such as the p99 of answers some of which never came."""
    return round(value, 3) if math.isfinite(value) else None


def plot(points: dict[str, list[Point]], file: Path) -> None:
    """p99 against the rate, one curve a workload."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in points.items():
        came = [one for one in found if math.isfinite(one.p99_ms)]
        label = {"generate": "generate, first piece", "stock": "translate, stock recipe"}.get(name, name)
        axes.plot([one.rate for one in came], [one.p99_ms for one in came], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="requests a second", ylabel="99 of 100 answers come within, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--translate", type=Path, default=Path("models/numbers-en-fr"), help="a model directory")
    parser.add_argument("--translate-data", type=Path, help="a data set with a column `en`; generated without it")
    parser.add_argument("--translate-within", type=float, default=1.0, help="seconds")
    parser.add_argument("--classify", type=Path, default=Path("models/sentiment"))
    parser.add_argument("--classify-data", type=Path, help="a data set with a column `sentence`; generated without it")
    parser.add_argument("--classify-within", type=float, default=0.25)
    parser.add_argument("--generate", type=Path, default=Path("models/language-model"))
    parser.add_argument("--generate-within", type=float, default=0.25, help="to the first piece of a stream")
    parser.add_argument("--profile", choices=["plain", "haproxy"], default="haproxy")
    parser.add_argument("--sentences", type=int, default=400, help="of each workload")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--max-requests", type=int, default=256, help="that setting of the service")
    parser.add_argument("--stock-batch", type=int, default=32, help="requests at most in a batch of the stock recipe")
    parser.add_argument("--plot", type=Path, help="an image file: p99 against the rate")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
