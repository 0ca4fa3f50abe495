"""What a step takes on a GPU, as it is and captured as a CUDA graph, and how many tokens a second come of it.

    python -m benchmarks.gpu_step

A translator with random weights: LSTM of 4 layers of 1,024 with attention, 32,000 tokens. One JSON line per result:

    gpu_step     step_ms of `rows` decoder rows (beams of 4), sources of 32 positions: embedding to logits, no search
    gpu_decode   tokens_per_second of the best hypotheses of the whole engine, beam 5, 512 requests at a time

`graphs` says whether steps were captured. Times are of the least of some rounds, after one to warm up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.workload import Run, least_seconds, make_requests, of_length, run
from seqmodels.captured import CapturedStepper, CudaCapture
from seqmodels.config import ModelConfig, Weights
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Decodes, Group, Stepper

WEIGHTS: tuple[Weights, ...] = ("float32", "float16", "bfloat16")
ROWS = (4, 8, 16, 32, 64, 128, 256, 512)
NUM_BEAMS = 5
WIDTH, POSITIONS = 4, 32  # of the lane that a single step is measured with
STEPS = 20  # in a round


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none here")
    torch.manual_seed(0)
    model = make_translator(options.layers, options.hidden, options.vocabulary).cuda()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for weights in WEIGHTS:
        for graphs, stepper in both(Stepper(model, weights)):
            for rows in ROWS:
                seconds = step_seconds(stepper, rows, options.repeats)
                result = {"weights": weights, "graphs": graphs, "rows": rows, "step_ms": round(1e3 * seconds, 3)}
                print(json.dumps({"benchmark": "gpu_step", **about, **result}), flush=True)
    for weights in WEIGHTS[1:]:
        for graphs, stepper in both(Stepper(model, weights)):
            result = {"weights": weights, "graphs": graphs, "batch": options.batch, "num_beams": NUM_BEAMS}
            result |= rates(decode(stepper, options.batch, options.tokens, options.repeats))
            print(json.dumps({"benchmark": "gpu_decode", **about, **result}), flush=True)


def make_translator(layers: int, hidden: int, vocabulary: int) -> SequenceGenerator:
    sizes = {"vocab_size": vocabulary, "embedding_size": hidden}
    encoder = {"input": "text", **sizes, "recurrent": {"hidden_size": hidden // 2, "bidirectional": True}}
    decoder = {**sizes, "recurrent": {"hidden_size": hidden, "num_layers": layers}, "attention": "general"}
    config = ModelConfig.parse({"architecture": "generator", "encoder": encoder, "decoder": decoder})
    return SequenceGenerator(config).eval()


def both(stepper: Stepper) -> list[tuple[bool, Decodes]]:
    """As it is, and captured."""
    return [(False, stepper), (True, CapturedStepper(stepper, CudaCapture(stepper.device)))]


@torch.inference_mode()
def step_seconds(stepper: Decodes, rows: int, repeats: int) -> float:
    """One step of one lane, each going on from the state of the last."""
    requests, device = rows // WIDTH, stepper.device
    sources = torch.randint(4, stepper.vocab_size, (requests, POSITIONS), device=device)
    memory = stepper.encode(sources, torch.full((requests,), POSITIONS, device=device))
    start = stepper.start(memory.select(torch.arange(requests, device=device).repeat_interleave(WIDTH)), rows)
    tokens = torch.randint(4, stepper.vocab_size, (rows,), device=device)
    groups = [Group(requests, WIDTH, memory)]

    def steps() -> None:
        state = start
        for _ in range(STEPS):
            state = stepper.step(tokens, state, groups)[1]
        synchronize(device)

    return least_seconds(steps, repeats) / STEPS


def decode(stepper: Decodes, batch: int, tokens: int, repeats: int) -> Run:
    """Twice the batch, so that newcomers take the places of those that left; the fastest run, after one to warm up."""
    sources = [
        torch.randint(4, stepper.vocab_size, (length,)) for length in torch.randint(5, 31, (2 * batch,)).tolist()
    ]
    params = SearchParams(num_beams=NUM_BEAMS, early_stopping=False)
    requests = [of_length(request, tokens) for request in make_requests(sources, params)]
    runs = [run(Engine(stepper, batch * NUM_BEAMS), requests) for _ in range(repeats + 1)]
    return min(runs[1:], key=lambda one: one.seconds)


def rates(one: Run) -> dict[str, Any]:
    return {
        "sentences": len(one.results),
        "output_tokens": one.tokens,
        "seconds": round(one.seconds, 3),
        "tokens_per_second": round(one.tokens / one.seconds),
    }


def synchronize(device: torch.device) -> None:
    """Wait until all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=512, help="requests at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=25, help="length of each answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
