"""What each kind of recurrence costs beside the fused LSTM of the same size.

    python -m benchmarks.cells [--threads 1] [--repeats 15]

One layer of 256, forward and backward, of 32 rows of 35 and of 256 steps; the same layer as an encoder at inference,
4 rows of 16 steps; and one step of decoding, without the output layer, of 5 and of 160 rows. All kinds take turns, so
that a noisy machine slows all of them. One JSON line per result: the median time and the median of ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from seqmodels.config import ModelConfig
from seqmodels.kernels import packed
from seqmodels.models import SequenceGenerator
from seqmodels.recurrent import Recurrent
from seqmodels.state import State
from seqmodels.stepper import Group, Stepper

BASE = "LSTM"
KINDS: dict[str, dict[str, Any]] = {
    BASE: {"cell": "lstm"},
    "GRU": {"cell": "gru"},
    "RNN": {"cell": "rnn_tanh"},
    "LSTM, zoneout": {"cell": "lstm", "zoneout": 0.1, "cell_zoneout": 0.1},
    "LSTM, layer_norm": {"cell": "lstm", "layer_norm": True},
    "GRU, layer_norm": {"cell": "gru", "layer_norm": True},
    "RNN, layer_norm": {"cell": "rnn_tanh", "layer_norm": True},
    "min_gru": {"cell": "min_gru"},
    "min_lstm": {"cell": "min_lstm"},
}
VOCAB_SIZE = 1000
Work = Callable[[], object]


def training(kind: str, size: int, rows: int, steps: int) -> Work:
    model, x = Recurrent(input_size=size, hidden_size=size, **KINDS[kind]), torch.randn(rows, steps, size)
    x.requires_grad_()  # as what comes from an embedding does

    def work() -> None:
        model.zero_grad()
        model(x)[0].sum().backward()

    return work


def encoding(kind: str, size: int, rows: int, steps: int) -> Work:
    model, x = (
        packed(Recurrent(input_size=size, hidden_size=size, **KINDS[kind]).eval()),
        torch.randn(rows, steps, size),
    )
    return torch.inference_mode()(lambda: model(x))


def decoding(kind: str, size: int, rows: int, steps: int) -> Work:
    """One step, whatever `steps` says."""
    recurrent = {**KINDS[kind], "hidden_size": size}
    decoder = {"vocab_size": VOCAB_SIZE, "embedding_size": size, "recurrent": recurrent}
    stepper = Stepper(SequenceGenerator(ModelConfig.parse({"architecture": "generator", "decoder": decoder})).eval())
    tokens, state = torch.arange(rows), State(torch.randn(rows, stepper.state_width))
    return torch.inference_mode()(lambda: stepper.features(tokens, state, [Group(rows, 1)]))


MEASURES: Sequence[tuple[str, Callable[[str, int, int, int], Work], int, int]] = (
    ("train", training, 32, 35),
    ("train", training, 32, 256),
    ("encode", encoding, 4, 16),
    ("decode", decoding, 5, 1),
    ("decode", decoding, 160, 1),
)


def compare(works: dict[str, Work], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds after one to warm up."""
    seconds: dict[str, list[float]] = {kind: [] for kind in works}
    for _ in range(repeats + 1):
        for kind, work in works.items():
            started = time.perf_counter()
            work()
            seconds[kind].append(time.perf_counter() - started)
    return {kind: taken[1:] for kind, taken in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden-size", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name, make, rows, steps in MEASURES:
        seconds = compare({kind: make(kind, options.hidden_size, rows, steps) for kind in KINDS}, options.repeats)
        for kind, taken in seconds.items():
            ratios = [mine / base for mine, base in zip(taken, seconds[BASE], strict=True)]
            line = {
                "benchmark": "cells",
                "threads": options.threads,
                "work": name,
                "rows": rows,
                "steps": steps,
                "recurrence": kind,
                "median_ms": round(1000 * statistics.median(taken), 3),
                "median_ratio_to_lstm": round(statistics.median(ratios), 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
