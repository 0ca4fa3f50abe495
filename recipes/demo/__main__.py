"""python -m recipes.demo [--exit]: train every task on generated data, serve the models, ask each a question.

The questions are held-out items of the generated data. With --exit the service stops after the answers, and the exit
status is 0 only if every model holds on its whole held-out split.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from serving.client import Client
from training.data.generated import generate
from training.data.rows import Row

RECIPES = Path(__file__).parent
MODELS = Path("models")
START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Goal:
    """What a model must score on held-out items; a baseline that cannot see order must stay below `baseline_below`."""

    metric: str
    at_least: float
    baseline_below: float | None = None


GOALS = {
    "sentiment": Goal("accuracy", 0.95, baseline_below=0.75),
    "numbers-en-fr": Goal("exact_match", 0.90),
    "captions": Goal("exact_match", 0.80),
    "number-tags": Goal("span_f1", 0.95),
    "frames": Goal("accuracy", 0.97, baseline_below=0.40),
    "clips": Goal("accuracy", 0.97, baseline_below=0.40),
    "clip-captions": Goal("exact_match", 0.80),
    "series": Goal("accuracy", 0.90),
    "language-model": Goal("perplexity", 0.0),  # printed, not judged
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.demo", description=__doc__)
    parser.add_argument("--exit", action="store_true", help="stop after the answers")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    for name in GOALS:
        _run("training", "train", str(RECIPES / f"{name}.yaml"), f"run.output_dir={MODELS / name}")
    held = [_held_out(name, goal) for name, goal in GOALS.items()]
    service = subprocess.Popen(
        [sys.executable, "-m", "serving", *(str(MODELS / name) for name in GOALS), "--port", str(options.port)]
    )
    try:
        with Client(f"http://127.0.0.1:{options.port}") as client:
            _wait_until_ready(client, service)
            _ask_everything(client)
        if not options.exit:
            print(f"\nThe service stays up until Ctrl-C. Its page: http://127.0.0.1:{options.port}/docs", flush=True)
            service.wait()
    except KeyboardInterrupt:
        pass
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(60)
    return 0 if all(held) else 1


def _run(*arguments: str) -> None:
    """One of our commands, as a user would type it."""
    print(f"\n$ python -m {' '.join(arguments)}", flush=True)
    if status := subprocess.run([sys.executable, "-m", *arguments]).returncode:
        sys.exit(status)


def _held_out(name: str, goal: Goal) -> bool:
    """Score a model on its test split, once; print the score beside the goal and the baseline."""
    report = MODELS / name / "evaluation-test.json"
    if not report.is_file() or report.stat().st_mtime < (MODELS / name / "model.safetensors").stat().st_mtime:
        baseline = ["--baseline"] if goal.baseline_below is not None else []
        _run("training", "evaluate", str(MODELS / name), "--split", "test", *baseline)
    scores: dict[str, float] = json.loads(report.read_text())["scores"]
    value = scores[goal.metric]
    baseline_score = next((score for metric, score in scores.items() if metric.endswith("_baseline")), None)
    held = value >= goal.at_least
    line = f"{name:>16}: {goal.metric} {value:.3f} on held-out items"
    line += f", at least {goal.at_least:.2f} wanted" if goal.at_least else ""
    if baseline_score is not None:
        line += f"; a baseline that cannot see order or motion {baseline_score:.3f}"
        held = held and (goal.baseline_below is None or baseline_score <= goal.baseline_below)
    print(line + ("" if held else "  <-- NOT HELD"), flush=True)
    return held


def _wait_until_ready(client: Client, service: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not client.is_ready():
        if service.poll() is not None or time.monotonic() > deadline:
            sys.exit("the service did not start; what it printed above says why")
        time.sleep(0.5)


def _ask_everything(client: Client) -> None:
    """One question of each kind: held-out items, and what the service answers."""
    rows = {name: generate(name)["test"][0] for name in GOALS}

    def ask(name: str, call: Callable[..., BaseModel], show: Callable[[Any], Any], **options: Any) -> None:
        row = rows[name]
        answer = call(row.item, model=name, **options)
        print(f"\n{name}\n  asked:  {_shown(row)}\n  answer: {show(answer)}\n  right:  {_target(row)}", flush=True)

    ask("sentiment", client.classify, lambda a: f"{a.results[0].label} ({a.results[0].score:.3f})")
    ask("numbers-en-fr", client.translate, lambda a: a.results[0].sequences[0].text, num_beams=5)
    ask("captions", client.caption, lambda a: a.results[0].sequences[0].text)
    ask("number-tags", client.tag, lambda a: ", ".join(f"{tag.text!r} {tag.label}" for tag in a.results[0].tags))
    ask("frames", client.tag, lambda a: " ".join(tag.label for tag in a.results[0].tags))
    ask("clips", client.classify, lambda a: f"{a.results[0].label} ({a.results[0].score:.3f})")
    ask("clip-captions", client.caption, lambda a: a.results[0].sequences[0].text)
    ask("series", client.classify, lambda a: f"{a.results[0].label} ({a.results[0].score:.3f})")
    _sample(client)
    _score(client, rows["numbers-en-fr"])


def _sample(client: Client) -> None:
    print("\nlanguage-model, sampled and streamed as it comes\n  answer: ", end="")
    for _, _, text in client.stream("generate", model="language-model", do_sample=True, max_new_tokens=40, seed=1):
        print(text, end="", flush=True)
    print()


def _score(client: Client, row: Row) -> None:
    right, wrong = row.references[0], "un"
    answer = client.score([right, wrong], [row.input, row.input], model="numbers-en-fr")
    print(f"\nscore, in nats, of translating {row.input!r}")
    for text, result in zip((right, wrong), answer.results, strict=True):
        print(f"  {result.score:9.2f}  {text}")


def _shown(row: Row) -> str:
    """A question as one line."""
    if isinstance(row.input, str):
        return row.input
    if isinstance(row.input, bytes):
        return f"a picture (PNG, {len(row.input)} bytes)"
    assert row.input is not None
    if isinstance(row.input[0], str):
        return " ".join(str(word) for word in row.input)
    return f"{len(row.input)} {'frames' if isinstance(row.input[0], bytes) else 'steps of numbers'}"


def _target(row: Row) -> str:
    return row.target if isinstance(row.target, str) else " ".join(row.target)


if __name__ == "__main__":
    sys.exit(main())
