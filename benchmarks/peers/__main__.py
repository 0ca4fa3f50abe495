"""Output tokens per second against OpenNMT-py and JoeyNMT: the same sentences, the same weights, in turn.

    python -m benchmarks.peers.install SCRATCH                                         # once
    python -m benchmarks.peers SCRATCH --model MODEL_DIR --data ../shared/data/multi30k

The model is trained by our trainer, with what the peers have no place for left out (`model.decoder.tie_embeddings=
false`; input feeding, which they have, our decoder has not). Its weights are written into each peer, and all read token
ids of our vocabulary, so no other tokenizer takes part and BLEU is that of one function under three searches. Ours runs
with early_stopping=false, num_return_sequences=1, length_penalty=0: the peers' objective, searched to the end.

Each system gets the test set in the order of the file and batches it as its own program does: ours lets the next
sentence join as one leaves, OpenNMT-py sorts by length first, JoeyNMT takes the order as it is. Ours stands in it up to
four times: in float32, with 8-bit weights, with a shortlist (`python -m training shortlist MODEL_DIR` learns it), and
with both. Loading and a first few sentences are not timed. Two settings: batch 32 on two threads, and batch 1 on one
thread for the first sentences only. Each round runs every system once, in processes of their own, so that a noisy
machine slows all; figures are medians over rounds. One JSON line per setting and system, output tokens counted with
their end mark, then one with the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu

from benchmarks.peers.exchange import EOS
from benchmarks.peers.install import TOOLKITS, python_of
from benchmarks.peers.ours import exported_weights
from benchmarks.workload import load_generator, read_column, read_sources

OURS = ("ours", "ours-int8", "ours-shortlist", "ours-int8-shortlist")
SYSTEMS = (*OURS, *TOOLKITS)


@dataclass(frozen=True)
class Setting:
    batch: int
    threads: int
    limit: int


@dataclass(frozen=True)
class Outcome:
    """What one system did in one round."""

    seconds: float
    answers: list[list[int]]
    peak_memory_mib: int

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.answers)) / self.seconds


def main() -> None:
    options = _parser().parse_args()
    texts = read_column(options.data, options.source, options.split)[: options.limit]
    references = read_column(options.data, options.target, options.split)[: options.limit]
    pretrained = load_generator(options.model)[1]
    sources = [source.tolist() for source in read_sources(pretrained, texts)]
    scratch = options.scratch.resolve()
    exported_weights(options.model, sources).save(scratch / "exported")
    assert pretrained.target_tokenizer is not None
    decode = pretrained.target_tokenizer.decode
    for setting in (Setting(32, 2, options.limit), Setting(1, 1, min(options.limit, options.limit_batch_1))):
        rounds = [
            {system: measure(scratch, system, setting, options.num_beams) for system in options.systems}
            for _ in range(options.rounds)
        ]
        for system in options.systems:
            outcomes = [one[system] for one in rounds]
            hypotheses = [decode([t for t in answer if t != EOS]) for answer in outcomes[0].answers]
            bleu = sacrebleu.corpus_bleu(hypotheses, [references[: len(hypotheses)]], lowercase=True).score
            line = summary(outcomes) | {"bleu": round(bleu, 1)}
            if "ours" in options.systems:
                line["same_as_ours"] = agreement(rounds[0]["ours"].answers, outcomes[0].answers)
            print_line(setting, system=system, **line)
        print_line(setting, **ratios(rounds))


def measure(scratch: Path, system: str, setting: Setting, num_beams: int) -> Outcome:
    """One system once, in a process and an environment of its own."""
    output = scratch / f"{system}.json"
    python, module = (sys.executable, "ours") if system in OURS else (str(python_of(scratch, system)), system)
    given = {**vars(setting), "num-beams": num_beams, "exported": scratch / "exported", "output": output}
    command = [python, "-m", f"benchmarks.peers.{module}", "--system", system]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return Outcome(**json.loads(output.read_text(encoding="utf-8")))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    first, seconds = outcomes[0], [one.seconds for one in outcomes]
    middle = statistics.median(seconds)
    tokens = sum(map(len, first.answers))
    return {
        "sentences": len(first.answers),
        "sentences_per_second": round(len(first.answers) / middle, 1),
        "tokens_per_second": round(tokens / middle),
        "tokens_per_sentence": round(tokens / len(first.answers), 1),
        "peak_memory_mib": first.peak_memory_mib,
        "spread": round(max(seconds) / min(seconds), 2),
    }


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of answers that are the same, token by token: the systems compute one function."""
    same = [one == other for one, other in zip(ours, theirs, strict=True)]
    return round(sum(same) / len(same), 3)


def ratios(rounds: Sequence[dict[str, Outcome]]) -> dict[str, Any]:
    """Our output tokens per second over each peer's: the median over rounds of the ratio within a round."""
    return {
        f"{own}_over_{peer}": round(
            statistics.median(one[own].tokens_per_second / one[peer].tokens_per_second for one in rounds), 2
        )
        for peer in TOOLKITS
        for own in OURS
        if {own, peer} <= rounds[0].keys()
    }


def print_line(setting: Setting, **fields: Any) -> None:
    line = {"benchmark": "peers", "batch": setting.batch, "threads": setting.threads, **fields}
    print(json.dumps(line), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="where `benchmarks.peers.install` put the peers")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--data", type=Path, required=True, help="folder or file of the test set")
    parser.add_argument("--source", default="en", help="column")
    parser.add_argument("--target", default="de", help="column")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=1000, help="sentences at batch 32")
    parser.add_argument("--limit-batch-1", type=int, default=200, help="sentences at batch 1")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    return parser


if __name__ == "__main__":
    main()
