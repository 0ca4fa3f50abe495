"""What a run says while it goes on: to the person watching, to its log, to TensorBoard.

metrics.jsonl holds what must be equal however often a run was interrupted; timings.jsonl holds the clock.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from training.report import numbers
from training.screen import screen

WIDE = 130  # columns of a terminal that has room for a bar; the numbers need all of 80
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on

Count = Callable[[int, int], None]  # how many are done, of how many


class Reporter:
    """One run's voice. Use as a context manager."""

    def __init__(self, directory: Path, console: Console | None = None) -> None:
        self.console = console or screen()
        self._directory = directory
        self._log = (directory / "metrics.jsonl").open("ab")
        self._timings = (directory / "timings.jsonl").open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._since = self._shown = time.monotonic()
        self._tokens, self._first_step, self._begin = 0, 0, time.monotonic()
        self._loss, self._clipped = float("nan"), 0.0
        self._watched, self._best = "", ""

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

    def watch(self, metric: str) -> None:
        """The score that decides which model is best; its best value so far is shown."""
        self._watched = metric

    def say(self, text: str) -> None:
        """A line for the person watching."""
        self.console.print(text, markup=False)

    def counting(self, what: str) -> AbstractContextManager[Count]:
        """See `counting`; before the first step."""
        return counting(what, self.console)

    def step(self, step: int, total_steps: int, done: Update) -> None:
        """Progress after one step: loss, share of steps clipped, best score, tokens/s and time left."""
        self._tokens += done.num_tokens
        if done.num_targets:
            now = done.loss / done.num_targets
            self._loss = now if self._loss != self._loss else 0.95 * self._loss + 0.05 * now
            self._clipped = 0.95 * self._clipped + 0.05 * done.clipped
        if self.console.is_terminal:
            self._draw(step, total_steps)
        elif time.monotonic() - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            left = (self._shown - self._begin) / max(1, step - self._first_step) * (total_steps - step)
            self.say(f"step {step}/{total_steps}  {self._standing}  {timedelta(seconds=round(left))} left")

    def log(self, line: Mapping[str, Any]) -> int:
        """Append to metrics.jsonl, TensorBoard and the clock's file; return where metrics.jsonl now ends, in bytes."""
        self._log.write(json.dumps(line).encode() + b"\n")
        self._log.flush()
        step = int(line["step"])
        if step > 0:
            self._write_timing(step)
        for name, value in numbers(line):
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if "validation" in line:
            scores = ", ".join(f"{name} {value:.4g}" for name, value in line["validation"].items())
            what = f"the mean of {len(line['average_of'])} models" if "average_of" in line else f"step {step}"
            self.say(f"{what}: validation {scores}{'  (best so far)' if line['best'] else ''}")
            if line["best"] and self._watched:
                self._best = f"best {self._watched} {line['validation'][self._watched]:.4g}  "
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
        self._rewind_timings(step)
        self._log.truncate(log_bytes)
        self._log.seek(log_bytes)
        self._first_step, self._begin = step, time.monotonic()
        self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=step + 1)

    def _rewind_timings(self, step: int) -> None:
        """Keep what is of steps up to this one; a kill may have left half a line, and a loss of power worse."""
        path = self._directory / "timings.jsonl"
        self._timings.close()
        whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        kept = [line for line in whole.splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._timings = path.open("a", encoding="utf-8")

    def show_examples(self, examples: Sequence[Example], codec: Codec) -> None:
        """The first examples as the model sees them."""
        self.say("The first examples as the model sees them:")
        for example in examples:
            self.say(f"  {_inputs_as_seen(example, codec)} -> {_targets_as_seen(example, codec)}")

    def _draw(self, step: int, total_steps: int) -> None:
        if self._bar is None:
            columns = (
                *((TextColumn("training"), BarColumn()) if self._is_wide else ()),
                MofNCompleteColumn(),
                TextColumn("{task.fields[standing]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total_steps, completed=self._first_step, standing="")
            self._bar.start()
        assert self._task is not None
        standing = self._standing
        if not self._is_wide:
            standing = standing.replace("  ", " ").replace("best ", "").replace("tokens/s", "tok/s")
        self._bar.update(self._task, completed=step, standing=standing)

    @property
    def _is_wide(self) -> bool:
        return self.console.width >= WIDE

    @property
    def _standing(self) -> str:
        clipped = f"clipped {self._clipped:.0%}  " if self._clipped >= 0.005 else ""
        return f"loss {self._loss:.3f}  {self._best}{clipped}{self._speed():,.0f} tokens/s"

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

    def watch(self, metric: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def counting(self, what: str) -> Iterator[Count]:
        yield lambda done, total: None

    def step(self, step: int, total_steps: int, done: Update) -> None:
        pass

    def log(self, line: Mapping[str, Any]) -> int:
        return 0

    def rewind(self, log_bytes: int, step: int) -> None:
        pass

    def show_examples(self, examples: Sequence[Example], codec: Codec) -> None:
        pass


@contextmanager
def counting(what: str, console: Console) -> Iterator[Count]:
    """A bar for long work, or a line every so often where there is no terminal. Call what is yielded with how many are
    done, of how many."""
    if console.is_terminal:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            console.print(f"{what}: {done} of {total}", markup=False)

    yield tell


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


def _step_of(line: str) -> float:
    """Of a line of timings; infinite where it cannot be read, since it says nothing that a result depends on."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf
