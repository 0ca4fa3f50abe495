"""How fast a training step is, beside a bare PyTorch loop of the same shapes and the peers' own training steps.

    python -m benchmarks.train_step [--device cpu] [--threads 2] [--steps 12] [--peers SCRATCH]

The shapes are those of Multi30k at 80 sentences a batch: a one-layer bidirectional LSTM 2 x 256, an LSTM decoder 512
with attention, 7,700 target tokens. The bare loop has no data loading, no logging and no checks. All train on the same
random batches with Adam and clipping, one step each in turn, so that a noisy machine slows all; ours and the bare loop
in bfloat16 as well. Prints one JSON line; the first steps are not counted.

--peers: where `benchmarks.peers.install` put OpenNMT-py and JoeyNMT. Each takes its steps in its own environment and
process, starting from our weights, and must have our loss on the first batch.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_step import synchronize
from benchmarks.peers.exchange import PAD, Exported
from benchmarks.peers.install import TOOLKITS
from benchmarks.peers.training import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    ROWS,
    Batch,
    Step,
    make_batches,
    peer_step,
    timed,
)
from benchmarks.workload import VOCAB_SIZE, make_model
from seqmodels.models import SequenceGenerator
from training.config import OptimSection
from training.optim import FULL, Precision, build_optimizer, update

WARM_UP = {"cpu": 2, "cuda": 13}  # steps; on a GPU each of the 13 lengths loads kernels of its own
Timed = Callable[[int], tuple[float, float]]  # number of a batch -> seconds and loss


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
        padding = torch.arange(memory.shape[1], device=inputs.device) >= lengths.to(inputs.device)[:, None]
        context = scores.masked_fill(padding[:, None], float("-inf")).softmax(-1) @ memory
        logits = self.output(torch.tanh(self.combine(torch.cat([outputs, context], 2))))
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD)


def ours(model: SequenceGenerator, precision: Precision = FULL) -> Step:
    """The update of the training loop, as the loop calls it."""
    section = OptimSection(learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    optimizer = build_optimizer(section, model.train())
    device = next(model.parameters()).device

    def step(batch: Batch) -> float:
        done = update(model, [batch], optimizer, section, LEARNING_RATE, precision=precision)
        synchronize(device)
        return done.loss / done.num_targets

    return step


def bare(model: Bare, bf16: bool = False) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    device = model.output.weight.device

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(batch["inputs"].to(device), batch["lengths"], batch["labels"].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        synchronize(device)
        return float(loss.detach())

    return step


def take_turns(systems: dict[str, Timed], steps: int) -> dict[str, list[float]]:
    """The seconds of each system's steps. Stops where systems that start from the same weights do not agree."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(steps):
        losses = {}
        for name, step in systems.items():
            taken, losses[name] = step(number)
            seconds[name].append(taken)
        if number == 0:
            for peer in TOOLKITS.keys() & systems.keys():
                assert abs(losses[peer] - losses["ours"]) < 1e-3, f"{peer} computes another function: {losses}"
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peers", type=Path, metavar="SCRATCH")
    options = parser.parse_args(arguments)
    if options.peers and options.device != "cpu":
        parser.error("--peers are run on a CPU alone; leave out --device")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device; leave out --device")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")  # as a training run does; see training/run.py
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warm_up = WARM_UP[options.device]
    model, count = make_model().to(options.device), options.steps + warm_up
    batches = make_batches(count, VOCAB_SIZE)
    with ExitStack() as stack:
        systems: dict[str, Timed] = {}
        if options.peers:
            exported = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            Exported("", model.state_dict(), []).save(exported)
            for peer in TOOLKITS:
                running = peer_step(options.peers.resolve(), peer, exported, options.threads)
                systems[peer] = stack.enter_context(running)
        steps = {
            "ours": ours(model),
            "bare": bare(Bare().to(options.device)),
            "ours_bf16": ours(make_model().to(options.device), Precision(torch.bfloat16)),
            "bare_bf16": bare(Bare().to(options.device), bf16=True),
        }
        systems |= {name: partial(timed, step, batches) for name, step in steps.items()}
        seconds = take_turns(systems, count)
    tokens = sum(int(batch["label_lengths"].sum()) - ROWS for batch in batches[warm_up:])
    result: dict[str, object] = {"benchmark": "train_step", "device": options.device, "threads": options.threads}
    for name, taken in seconds.items():
        result[f"{name}_target_tokens_per_second"] = round(tokens / sum(taken[warm_up:]))
    others = sorted(seconds.keys() - {"ours", "ours_bf16", "bare_bf16"})
    for mine, beside in (("ours", others), ("ours_bf16", [*others, "bare_bf16"])):
        for other in beside:
            ratios = [theirs / own for own, theirs in zip(seconds[mine], seconds[other], strict=True)]
            result[f"{mine}_median_ratio_to_{other}"] = round(statistics.median(ratios[warm_up:]), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
