"""What a run says: to the person watching, to its log, to TensorBoard, and in a report at its end.

metrics.jsonl holds what must be equal however often a run was interrupted; timings.jsonl holds the clock.
"""

import html
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from seqmodels.errors import CheckpointError
from seqmodels.losses import IGNORE
from seqmodels.tokenizer import Tokenizer
from training.data.examples import Codec, Example
from training.optim import Update

# Name in the log: panel, and what the curve is called there.
CURVES = {
    "nll": ("nats per target", "training nll"),
    "loss": ("nats per target", "training loss"),
    "validation/nll": ("nats per target", "validation nll"),
    "validation/accuracy": ("validation, of 1", "accuracy"),
    "validation/macro_f1": ("validation, of 1", "macro F1"),
    "validation/span_f1": ("validation, of 1", "span F1"),
    "validation/exact_match": ("validation, of 1", "exact match"),
    "validation/bleu": ("validation, of 100", "BLEU"),
    "validation/bleu_lowercase": ("validation, of 100", "BLEU, lower case"),
    "validation/chrf": ("validation, of 100", "chrF"),
    "validation/bits_per_character": ("validation, bits", "bits per character"),
    "learning_rate": ("learning rate", "learning rate"),
    "gradient_norm": ("gradient", "norm before clipping"),
}
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on


class Reporter:
    """One run's voice. Use as a context manager."""

    def __init__(self, directory: Path, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._directory = directory
        self._log = (directory / "metrics.jsonl").open("ab")
        self._timings = (directory / "timings.jsonl").open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._since = self._shown = time.monotonic()
        self._tokens, self._first_step, self._begin = 0, 0, time.monotonic()
        self._loss = float("nan")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._log.close()
        self._timings.close()

    def say(self, text: str) -> None:
        """A line for the person watching."""
        self.console.print(text, markup=False)

    def step(self, step: int, total_steps: int, done: Update) -> None:
        """Progress after one step: loss, tokens/s and time left."""
        self._tokens += done.num_tokens
        if done.num_targets:
            now = done.loss / done.num_targets
            self._loss = now if self._loss != self._loss else 0.95 * self._loss + 0.05 * now
        if self.console.is_terminal:
            self._draw(step, total_steps)
        elif time.monotonic() - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            left = (self._shown - self._begin) / max(1, step - self._first_step) * (total_steps - step)
            self.say(
                f"step {step}/{total_steps}  loss {self._loss:.3f}  {self._speed():,.0f} tokens/s  "
                f"{timedelta(seconds=round(left))} left"
            )

    def log(self, line: Mapping[str, Any]) -> int:
        """Append to metrics.jsonl, TensorBoard and the clock's file; return where metrics.jsonl now ends, in bytes."""
        self._log.write(json.dumps(line).encode() + b"\n")
        self._log.flush()
        step = int(line["step"])
        self._write_timing(step)
        for name, value in _numbers(line):
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if "validation" in line:
            scores = ", ".join(f"{name} {value:.4g}" for name, value in line["validation"].items())
            what = f"the mean of {len(line['average_of'])} models" if "average_of" in line else f"step {step}"
            self.say(f"{what}: validation {scores}{'  (best so far)' if line['best'] else ''}")
        return self._log.tell()

    def flush(self) -> None:
        """Make sure the log is on the disk before a checkpoint says how long it is."""
        os.fsync(self._log.fileno())

    def rewind(self, log_bytes: int, step: int) -> None:
        """Forget what was logged after a checkpoint. Raises CheckpointError where some of the log before it is gone."""
        length = (self._directory / "metrics.jsonl").stat().st_size
        if length < log_bytes:
            raise CheckpointError(
                f"metrics.jsonl has {length} bytes, but the checkpoint was made at {log_bytes}; bring it back, or "
                "start again in a new run.output_dir"
            )
        self._log.truncate(log_bytes)
        self._log.seek(log_bytes)
        self._first_step, self._begin = step, time.monotonic()
        self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=step + 1)

    def show_examples(self, examples: Sequence[Example], codec: Codec) -> None:
        """The first examples as the model sees them."""
        self.say("The first examples as the model sees them:")
        for example in examples:
            self.say(f"  {_inputs_as_seen(example, codec)} -> {_targets_as_seen(example, codec)}")

    def _draw(self, step: int, total_steps: int) -> None:
        if self._bar is None:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total_steps, completed=self._first_step, loss=0.0, speed=0.0)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=step, loss=self._loss, speed=self._speed())

    def _speed(self) -> float:
        """Tokens a second since the run began or went on."""
        return self._tokens / max(1e-9, time.monotonic() - self._begin)

    def _write_timing(self, step: int) -> None:
        now = time.monotonic()
        timing = {"step": step, "seconds": round(now - self._since, 3), "tokens_per_second": round(self._speed(), 1)}
        self._timings.write(json.dumps(timing) + "\n")
        self._timings.flush()
        self._since = now


class Silence(Reporter):
    """The voice of a worker that leaves the talking to the first."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def step(self, step: int, total_steps: int, done: Update) -> None:
        pass

    def log(self, line: Mapping[str, Any]) -> int:
        return 0

    def rewind(self, log_bytes: int, step: int) -> None:
        pass

    def show_examples(self, examples: Sequence[Example], codec: Codec) -> None:
        pass


def write_report(
    directory: Path, title: str, facts: Mapping[str, object], samples: Sequence[Mapping[str, str]]
) -> None:
    """report.html: one file that a person would look at. Curves are drawn from metrics.jsonl."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = draw_curves(lines)
    (directory / "curves.svg").write_text(curves, encoding="utf-8")
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items()
    )
    body = f"""<table>{rows}</table><h2>Curves</h2>{curves[curves.index("<svg") :]}
{_samples_table(samples)}"""
    (directory / "report.html").write_text(html_page(title, body), encoding="utf-8")


def html_page(title: str, body: str) -> str:
    """One self-contained page. body: HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0}}th,td{{text-align:left;padding:.25rem .8rem;border-bottom:1px solid #ddd;
vertical-align:top;white-space:pre-wrap}}th{{font-weight:600}}svg{{width:100%;height:auto}}</style></head>
<body><h1>{html.escape(title)}</h1>{body}</body></html>
"""


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """Loss, validation scores, learning rate and gradient norm over steps, as SVG."""
    import matplotlib  # costs half a second, and only the end of a run needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    smoothed = any(line.get("loss") != line.get("nll") for line in lines)
    for line in lines:
        for name, value in _numbers(line):
            if name in CURVES and (smoothed or name != "loss"):
                panel, label = CURVES[name]
                panels.setdefault(panel, {}).setdefault(label, []).append((line["step"], value))
    names = sorted(panels, key=[panel for panel, _ in CURVES.values()].index)
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for label, points in panels[name].items():
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend(fontsize="small", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()


def _samples_table(samples: Sequence[Mapping[str, str]]) -> str:
    return f"<h2>What it says</h2>{html_table(samples)}" if samples else ""


def html_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines that all have the keys of the first."""
    heads = list(lines[0])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(row[name])}</td>' for name in heads)}</tr>" for row in lines)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _numbers(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, value) of all that is worth a curve."""
    flat = {**line, **{f"validation/{name}": value for name, value in line.get("validation", {}).items()}}
    return [
        (name, float(value))
        for name, value in flat.items()
        if isinstance(value, int | float) and name not in ("step", "best")
    ]


def _inputs_as_seen(example: Example, codec: Codec) -> str:
    if codec.config.input == "nothing":
        return "(nothing)"
    if codec.config.input in ("image", "frames"):
        picture = example.inputs if isinstance(example.inputs, bytes) else example.inputs[0]
        shape = " x ".join(map(str, codec.decode_picture(picture).shape))
        return f"[{shape}]" if codec.config.input == "image" else f"{len(example.inputs)} frames of [{shape}]"
    if codec.config.input == "features":
        return f"{len(example.inputs)} steps, the first {list(example.inputs[0])}"
    assert codec.source_tokenizer is not None
    spelt = codec.config.characters is not None
    return _pieces(codec.source_tokenizer, example.inputs[:, 0].tolist() if spelt else example.inputs)


def _targets_as_seen(example: Example, codec: Codec) -> str:
    targets, labels = example.targets, codec.config.labels
    if isinstance(targets, int):
        return labels[targets]
    match codec.config.problem_type:
        case "multi_label_classification":
            return ", ".join(label for label, right in zip(labels, targets, strict=True) if right) or "(no label)"
        case "regression":
            return ", ".join(f"{name} {number:g}" for name, number in zip(labels, targets, strict=True))
    if codec.config.architecture == "tagger":
        return " ".join("·" if label == IGNORE else labels[label] for label in targets[:40])
    assert codec.target_tokenizer is not None
    return _pieces(codec.target_tokenizer, targets)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The first pieces, spaces between them; a space that is part of a piece shows as ▁."""
    return " ".join(_piece(tokenizer, token) for token in ids[:40])


def _piece(tokenizer: Tokenizer, token: int) -> str:
    spelt, text = tokenizer.token(token), tokenizer.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a special token, or part of a character
        return spelt
    space = "▁" if spelt.startswith("Ġ") else ""  # the library's sign for a leading space
    return space + text.strip(" ").replace("\n", "⏎") or "▁"
