"""How fast the engine decodes: output tokens per second, by beam width and batch size.

    python -m benchmarks.decode [--threads 2] [--repeats 3]

The model has the size of a Multi30k translator and random weights, and each answer is made exactly `--tokens` long, so
that figures depend on the engine and not on what was learned. Prints one JSON line per result; compare ratios within
one run, since machines differ and are shared.
"""

import argparse
import json
import statistics
import time

import torch

from seqmodels.config import ModelConfig
from seqmodels.decoding.engine import Request
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.models import SequenceGenerator

VOCAB_SIZE = 7700


def make_model() -> SequenceGenerator:
    """One-layer bidirectional LSTM 2 x 256 -> LSTM 512 with attention."""
    encoder = {
        "input": "text",
        "vocab_size": VOCAB_SIZE,
        "embedding_size": 256,
        "recurrent": {"hidden_size": 256, "bidirectional": True},
    }
    decoder = {
        "vocab_size": VOCAB_SIZE,
        "embedding_size": 256,
        "recurrent": {"hidden_size": 512},
        "attention": "general",
    }
    config = ModelConfig.parse({"architecture": "generator", "encoder": encoder, "decoder": decoder})
    return SequenceGenerator(config).eval()


def make_requests(count: int, params: SearchParams) -> list[Request]:
    """Sources of 5 to 30 tokens, 15 in the mean, as in Multi30k."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 26, (count,), generator=generator).tolist()
    return [
        Request(str(i), torch.randint(4, VOCAB_SIZE, (length,), generator=generator), params)
        for i, length in enumerate(lengths)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=13, help="length of each answer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = make_model()
    for num_beams in (1, 5):
        for batch in (1, 8, 32, 128):
            params = SearchParams(
                num_beams=num_beams, max_new_tokens=options.tokens, min_new_tokens=options.tokens, early_stopping=False
            )
            requests = make_requests(max(batch, 8), params)
            seconds = []
            for _ in range(options.repeats + 1):
                started = time.perf_counter()
                for first in range(0, len(requests), batch):
                    generate(model, requests[first : first + batch], max_rows=batch * num_beams)
                seconds.append(time.perf_counter() - started)
            tokens = len(requests) * options.tokens
            result = {
                "benchmark": "decode",
                "num_beams": num_beams,
                "batch": batch,
                "threads": options.threads,
                "tokens_per_second": round(tokens / statistics.median(seconds[1:])),
                "spread": round(max(seconds[1:]) / min(seconds[1:]), 2),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
