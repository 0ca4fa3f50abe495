"""How fast the engine decodes a whole test set, and how near that is to the arithmetic alone.

    python -m benchmarks.decode --model models/multi30k-en-de --data ../shared/data/multi30k --column en --threads 2
    python -m benchmarks.decode                       # random weights, generated sources, answers of --tokens tokens

All sentences are submitted at once and `batch` of them run at a time: as one leaves, the next joins. `sorted` gives the
engine the longest sources first, `unsorted` the order of the file. One JSON line per result:

    tokens_per_second        output tokens of the best hypotheses, EOS counted; the median of --repeats runs
    steps_per_token          steps that requests took per such token: 1 where no step was taken in vain
    floor_tokens_per_second  the same tokens over the time of the matrix products alone, see benchmarks/floor.py
    of_floor                 how many times as long as those products the run took: 1 would be perfect
    rows_per_step            decoder rows in the mean step, of batch x num_beams
    peak_memory_mib          the process's, during this result
    spread                   slowest over fastest run

Compare ratios within one run, since machines differ and are shared.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.floor import Floor
from benchmarks.memory import peak_memory_mib, reset_peak_memory
from benchmarks.workload import (
    Run,
    load_generator,
    make_model,
    make_requests,
    make_sources,
    of_length,
    read_column,
    read_sources,
    run,
)
from seqmodels.config import Weights
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Stepper

ORDERS = ("unsorted", "sorted")
WARM_UP = 8  # sentences


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, sources = load(options)
    floor, stepper = Floor(model.config), Stepper(model, options.decoder_weights)
    for num_beams in options.beams:
        params = SearchParams(
            num_beams=num_beams,
            max_new_tokens=options.max_new_tokens,
            early_stopping=False,
            length_penalty=options.length_penalty,
        )
        for batch in options.batches:
            for order in options.orders:
                requests = ordered(make_requests(sources, params), order)
                if options.model is None:
                    requests = [of_length(request, options.tokens) for request in requests]
                given = {"data": options.data.name if options.data else "generated", "order": order, "batch": batch}
                given |= {"threads": options.threads, "decoder_weights": options.decoder_weights}
                result = measure(stepper, floor, requests, batch, options.repeats)
                print(json.dumps({"benchmark": "decode", **given, **result}), flush=True)


def load(options: argparse.Namespace) -> tuple[SequenceGenerator, list[Tensor]]:
    """The model, and the sources of as many sentences as asked for."""
    if options.model is None:
        return make_model(), make_sources(options.limit)
    model, pretrained = load_generator(options.model)
    texts = read_column(options.data, options.column, options.split)[: options.limit]
    return model, read_sources(pretrained, texts)


def ordered(requests: Sequence[Request], order: str) -> list[Request]:
    """As they come, or longest source first."""
    if order == "unsorted":
        return list(requests)
    return sorted(requests, key=_length, reverse=True)


def measure(stepper: Stepper, floor: Floor, requests: Sequence[Request], batch: int, repeats: int) -> dict[str, Any]:
    """One result: the engine's runs, then the floor of the steps that they took."""
    num_beams = requests[0].params.num_beams
    reset_peak_memory()
    run(Engine(stepper, batch * num_beams), requests[:WARM_UP])
    runs = [run(Engine(stepper, batch * num_beams), requests) for _ in range(repeats)]
    memory = peak_memory_mib()
    seconds = [one.seconds for one in runs]
    positions = round(statistics.mean(map(_length, requests)))
    size = min(batch, len(requests))
    floor_seconds = floor.seconds(runs[0].rows, num_beams, positions, len(requests) / size, size)
    return {"num_beams": num_beams, **rates(runs[0], num_beams, statistics.median(seconds))} | {
        "floor_tokens_per_second": round(runs[0].tokens / floor_seconds),
        "of_floor": round(statistics.median(seconds) / floor_seconds, 2),
        "peak_memory_mib": memory,
        "spread": round(max(seconds) / min(seconds), 2),
    }


def rates(one: Run, num_beams: int, seconds: float) -> dict[str, float]:
    return {
        "sentences": len(one.results),
        "sentences_per_second": round(len(one.results) / seconds, 1),
        "tokens_per_second": round(one.tokens / seconds),
        "steps_per_token": round(sum(one.rows) / num_beams / one.tokens, 2),
        "rows_per_step": round(statistics.mean(one.rows), 1),
        "output_tokens": one.tokens,
    }


def _length(request: Request) -> int:
    return 0 if request.inputs is None else len(request.inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; random weights without it")
    parser.add_argument("--data", type=Path, help="folder or file of the test set")
    parser.add_argument("--column", default="en", help="of the sources")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=200, help="sentences at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--decoder-weights", choices=get_args(Weights), default="float32", help="the floor is float32's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--length-penalty", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=13, help="length of each answer where weights are random")
    return parser


if __name__ == "__main__":
    main()
