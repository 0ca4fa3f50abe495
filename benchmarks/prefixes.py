"""What prompts cost those that run, and what a prompt costs that others have read before.

    python -m benchmarks.prefixes [--threads 1]

A language model of one LSTM of 512 with random weights, 7,700 tokens. One JSON line per result:

    longest_turn_ms, median_turn_ms   turns of the engine while requests of one row run and prompts arrive
    first_answer_ms                   from the arrival of the prompts to the first token of one of them
    alone_ms, tokens_read             of prompts that share all but 8 tokens, one after the other, cache off and on
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.workload import VOCAB_SIZE
from seqmodels.config import ModelConfig
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished, Request
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Stepper

ONE_TOKEN = SearchParams(max_new_tokens=1)
RUNNING = SearchParams(max_new_tokens=10_000, min_new_tokens=10_000)
WARM_UP = 20  # turns


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = make_stepper()
    for running, prompts in ((4, 1), (32, 1), (4, 16)):
        result = measure_company(model, running, [make_prompt(options.tokens) for _ in range(prompts)])
        print(json.dumps({"benchmark": "prefixes", "running": running, "prompts": prompts, **result}), flush=True)
    for states in (0, 1024):
        shared = make_prompt(options.tokens - 8)
        result = measure_sharing(Engine(model, prefix_cache_states=states), [shared + make_prompt(8) for _ in range(3)])
        print(json.dumps({"benchmark": "prefixes", "prefix_cache_states": states, **result}), flush=True)


def make_stepper() -> Stepper:
    decoder = {"vocab_size": VOCAB_SIZE, "embedding_size": 256, "recurrent": {"hidden_size": 512}}
    return Stepper(SequenceGenerator(ModelConfig.parse({"architecture": "generator", "decoder": decoder})).eval())


def make_prompt(tokens: int) -> tuple[int, ...]:
    return tuple(torch.randint(4, VOCAB_SIZE, (tokens,)).tolist())


def measure_company(model: Stepper, running: int, prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    engine = Engine(model)
    for i in range(running):
        engine.submit(Request(f"running {i}", None, RUNNING))
    for _ in range(WARM_UP):
        engine.step()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(f"prompt {i}", None, ONE_TOKEN, prompt))
    turns: list[float] = []  # seconds
    answered_at: list[float] = []
    while len(answered_at) < len(prompts):
        start = time.perf_counter()
        finished = [event for event in engine.step() if isinstance(event, Finished)]
        turns.append(time.perf_counter() - start)
        answered_at += [sum(turns)] * len(finished)
    return {
        "longest_turn_ms": _ms(max(turns)),
        "median_turn_ms": _ms(statistics.median(turns)),
        "first_answer_ms": _ms(answered_at[0]),
    }


def measure_sharing(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    seconds, read = [], [0]
    for i, prompt in enumerate(prompts):
        start = time.perf_counter()
        engine.submit(Request(str(i), None, ONE_TOKEN, prompt))
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - start)
        read.append(engine.prefill_tokens[0])
    return {
        "alone_ms": [_ms(one) for one in seconds],
        "tokens_read": [after - before for before, after in pairwise(read)],
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
