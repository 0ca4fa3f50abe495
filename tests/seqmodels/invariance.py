"""Random schedules in number: is a request's answer the same to the last bit, whoever it shares the batch with?

    python -m tests.seqmodels.invariance [--schedules 10000] [--leak 10000]

The tests run 1,900 of these schedules; this runs as many as are asked for, with new requests for every 200, and then a
long soak with random cancels, after which every row must be free and memory flat. Exit status 1 where anything differs.
"""

import argparse
import gc
import random
import resource
import sys

import torch
from rich.progress import track

from seqmodels.decoding.engine import Engine
from seqmodels.selftest import find_row_floor
from tests.seqmodels.builders import make_translator
from tests.seqmodels.test_engine import SMALL_MODELS, UNFUSED_MODELS, random_bank, random_request, run_schedule

SCHEDULES_PER_BANK = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--leak", type=int, default=10_000, help="requests of the soak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    banks = -(-options.schedules // SCHEDULES_PER_BANK)
    models = [*SMALL_MODELS, *UNFUSED_MODELS]
    for bank in track(range(banks), description=f"{options.schedules} schedules", disable=None):
        name, make = models[bank % len(models)]
        model, choose = make(), random.Random(options.seed * 1_000_003 + bank)
        floor = find_row_floor(model)
        if floor is None:
            print(f"{name}: on this machine these shapes are not batch invariant; /readyz would say so")
            return 1
        requests, expected = random_bank(choose, model, floor, 60)
        for _ in range(min(SCHEDULES_PER_BANK, options.schedules - bank * SCHEDULES_PER_BANK)):
            run_schedule(choose, model, floor, requests, expected)  # type: ignore[arg-type]
    print(f"{options.schedules} schedules: no bit differs")
    return soak(options.leak, options.seed)


def soak(requests: int, seed: int) -> int:
    """Many requests through one engine, a third of them cancelled at some time."""
    model, choose = make_translator(1), random.Random(seed)
    engine = Engine(model, max_rows=48)
    before = None
    for i in track(range(requests), description="soak", disable=None):
        engine.submit(random_request(choose, str(i), model, longest=20))
        engine.step()
        if choose.random() < 0.3:
            engine.cancel(str(choose.randrange(max(0, i - 50), i + 1)))
        if i == requests // 5:  # by then every table has reached its size
            before = tensors_alive()
    while engine.has_work:
        engine.step()
    after = tensors_alive()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{requests} requests: {engine.num_rows} rows in use, {before} tensors alive early, {after} at the end")
    print(f"peak memory {peak} MiB")
    return 1 if engine.num_rows or engine.num_waiting or (before is not None and after > before) else 0


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


if __name__ == "__main__":
    sys.exit(main())
