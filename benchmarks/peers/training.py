"""Training steps on demand: the same batches in every environment, and the pipe through which a peer is asked for one.

Runs in every environment, so it imports nothing of ours beyond `exchange`. A peer starts from our weights, so that its
loss on the first batch must be ours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.exchange import BOS, EOS, PAD, Exported
from benchmarks.peers.install import python_of

ROWS = 80
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
Batch = dict[str, Tensor]
Step = Callable[[Batch], float]  # one update of the weights -> the loss per target that it was made for


def make_batches(count: int, vocab_size: int) -> list[Batch]:
    """Rows of nearly one length each, 15 tokens in the mean, as length bucketing makes them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(count):
        length = 9 + index % 13
        lengths = torch.randint(length - 1, length + 2, (ROWS,), generator=generator)
        inputs = torch.randint(4, vocab_size, (ROWS, int(lengths.max())), generator=generator)
        labels = torch.randint(4, vocab_size, (ROWS, int(lengths.max()) + 1), generator=generator)
        inputs[torch.arange(inputs.shape[1]) >= lengths[:, None]] = PAD
        labels[:, 0], labels[torch.arange(ROWS), lengths] = BOS, EOS
        labels[torch.arange(labels.shape[1]) > lengths[:, None]] = PAD
        batches.append({"inputs": inputs, "lengths": lengths, "labels": labels, "label_lengths": lengths + 1})
    return batches


def timed(step: Step, batches: Sequence[Batch], number: int) -> tuple[float, float]:
    """(seconds, loss) of a step on one of the batches."""
    started = time.perf_counter()
    loss = step(batches[number])
    return time.perf_counter() - started, loss


@contextmanager
def peer_step(scratch: Path, peer: str, exported: Path, threads: int) -> Iterator[Callable[[int], tuple[float, float]]]:
    """A peer in a process of its own: called with a batch's number, it takes one step and says (seconds, loss)."""
    command = [str(python_of(scratch, peer)), "-m", f"benchmarks.peers.{peer}_training"]
    command += ["--exported", str(exported), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def step(number: int) -> tuple[float, float]:
            print(number, file=asked, flush=True)
            seconds, loss = json.loads(answers.readline())
            return seconds, loss

        yield step
        asked.close()  # it ends when nobody asks any more


def main(load: Callable[[Exported], Step]) -> None:
    """The command line of one peer: a line with a batch's number in, a line with seconds and loss out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # toolkits print as they like
    exported = Exported.load(options.exported)
    step, vocab_size = load(exported), exported.vocab_sizes[1]
    for line in sys.stdin:
        number = int(line)
        print(json.dumps(timed(step, make_batches(number + 1, vocab_size), number)), file=answers, flush=True)
