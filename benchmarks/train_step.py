"""How fast a training step is, beside a bare PyTorch loop of the same shapes.

    python -m benchmarks.train_step [--threads 2] [--steps 12]

The shapes are those of Multi30k at 80 sentences a batch: a one-layer bidirectional LSTM 2 x 256, an LSTM decoder 512
with attention, 7,700 target tokens. The bare loop has no data loading, no logging and no checks; both train on the
same random batches, in turn, so that a noisy machine slows both; ours in bfloat16 as well. Prints one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workload import VOCAB_SIZE, make_model
from seqmodels.models import SequenceGenerator
from training.config import OptimSection
from training.optim import FULL, Precision, build_optimizer, update

ROWS, PAD = 80, 0
Batch = dict[str, Tensor]


class Bare(nn.Module):
    """The textbook translator, as short as PyTorch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCAB_SIZE, 256)
        self.target = nn.Embedding(VOCAB_SIZE, 256)
        self.encoder = nn.LSTM(256, 256, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(256, 512, batch_first=True)
        self.bridge = nn.Linear(512, 1024)
        self.keys = nn.Linear(512, 512, bias=False)
        self.combine = nn.Linear(1024, 512)
        self.output = nn.Linear(512, VOCAB_SIZE)

    def forward(self, inputs: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.source(inputs), lengths, batch_first=True, enforce_sorted=False)
        output, (hidden, _) = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        start = torch.tanh(self.bridge(torch.cat([hidden[0], hidden[1]], 1)))
        first = tuple(part[None].contiguous() for part in start.chunk(2, 1))
        outputs, _ = self.decoder(self.target(labels[:, :-1]), first)
        scores = outputs @ self.keys(memory).mT
        padding = torch.arange(memory.shape[1]) >= lengths[:, None]
        context = scores.masked_fill(padding[:, None], float("-inf")).softmax(-1) @ memory
        logits = self.output(torch.tanh(self.combine(torch.cat([outputs, context], 2))))
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD)


def make_batches(count: int) -> list[Batch]:
    """Rows of nearly one length each, 15 tokens in the mean, as length bucketing makes them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(count):
        length = 9 + index % 13
        lengths = torch.randint(length - 1, length + 2, (ROWS,), generator=generator)
        inputs = torch.randint(4, VOCAB_SIZE, (ROWS, length + 1), generator=generator)
        labels = torch.randint(4, VOCAB_SIZE, (ROWS, length + 2), generator=generator)
        labels[torch.arange(length + 2) >= lengths[:, None] + 1] = PAD
        batches.append({"inputs": inputs, "lengths": lengths, "labels": labels, "label_lengths": lengths + 1})
    return batches


def ours(model: SequenceGenerator, precision: Precision = FULL) -> Callable[[Batch], None]:
    """The update of the training loop, as the loop calls it."""
    section = OptimSection(learning_rate=1e-3, max_grad_norm=1.0)
    optimizer = build_optimizer(section, model.train())

    def step(batch: Batch) -> None:
        update(model, [batch], optimizer, section, 1e-3, precision=precision)

    return step


def bare(model: Bare) -> Callable[[Batch], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        model(batch["inputs"], batch["lengths"], batch["labels"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    steps = {
        "ours": ours(make_model()),
        "ours_bf16": ours(make_model(), Precision(torch.bfloat16)),
        "bare": bare(Bare()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    batches = make_batches(options.steps + 2)
    for batch in batches:
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - started)
    tokens = sum(int(batch["label_lengths"].sum()) - ROWS for batch in batches[2:])
    result: dict[str, object] = {"benchmark": "train_step", "threads": options.threads}
    for name, taken in seconds.items():
        result[f"{name}_target_tokens_per_second"] = round(tokens / sum(taken[2:]))
        if name != "bare":
            ratios = [theirs / mine for mine, theirs in zip(taken[2:], seconds["bare"][2:], strict=True)]
            result[f"{name}_median_ratio_to_bare"] = round(statistics.median(ratios), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
