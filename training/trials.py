"""What came of the trials of a search: their scores, a table of them, a report; and what is kept of each.

    trials.csv      how each ended, its best score, and what was tried
    report.html     the same with plots: scores by step, and the best score by each value that was tried

Knows run directories and their logs; knows no Ray.
"""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from training import checkpoint
from training.config import Recipe, merit
from training.data.encoded import ENCODED
from training.directory import FINISHED, as_yaml, readable_run
from training.initial import BEGIN
from training.report import html_facts, html_page, html_table, html_text, provenance
from training.space import Space, Trial

CSV = "trials.csv"
# Removed from all but the best.
LARGE = ("checkpoints", "validated", "snapshots", "tensorboard", "model.safetensors", ENCODED, BEGIN)


@dataclass(frozen=True)
class Outcome:
    """ended: finished, stopped or failed. name: of what decides. points: (step, value) of each validation. best, nll:
    of the best step, None where there was no validation. problem: why it failed."""

    trial: Trial
    ended: str
    name: str
    points: tuple[tuple[int, float], ...]
    best: float | None
    nll: float | None
    problem: str = ""

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The better of two has the larger one, as in a run."""
        if self.best is None or self.nll is None:
            return False, 0.0, 0.0
        return True, *merit(self.name, {self.name: self.best, "nll": self.nll})

    @property
    def line(self) -> dict[str, Any]:
        """Of the table."""
        return {
            "trial": self.trial.number,
            "ended": self.ended,
            "steps": self.points[-1][0] if self.points else 0,
            self.name: self.best,
            "nll": self.nll,
            **self.trial.values,
            "problem": self.problem,
        }


def validations(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that hold scores."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a trial may be stopped while it writes
    return [line for line in map(json.loads, whole.splitlines()) if "validation" in line]


def score_of(recipe: Recipe, scores: Mapping[str, float]) -> tuple[str, float, float]:
    """The name and value of what decides which model is best, and a number that is the larger the better it is."""
    name = recipe.metric(has_spans="span_f1" in scores)
    return name, scores[name], merit(name, scores)[0]


def outcome_of(trial: Trial, problem: str = "") -> Outcome:
    """From what the trial's directory holds. problem: why it failed, if it did."""
    lines = validations(trial.directory)
    ended = "failed" if problem else "finished" if (trial.directory / FINISHED).is_file() else "stopped"
    if not lines:
        return Outcome(trial, ended, trial.recipe.metric(has_spans=False), (), None, None, problem)
    name, *_ = score_of(trial.recipe, lines[0]["validation"])
    best = max((line["validation"] for line in lines), key=lambda scores: merit(name, scores))
    points = tuple((line["step"], line["validation"][name]) for line in lines)
    return Outcome(trial, ended, name, points, best[name], best["nll"], problem)


def already_done(directory: Path) -> dict[int, str]:
    """How trials ended in an earlier call that came to its end, by number; but for those that failed."""
    path = directory / CSV
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {int(line["trial"]): line["ended"] for line in csv.DictReader(file) if line["ended"] != "failed"}


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first."""
    return sorted(outcomes, key=lambda outcome: outcome.rank, reverse=True)


def table_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A line for each trial, the best first, all with the same keys; None where there is nothing to tell."""
    lines = [outcome.line for outcome in ranked(outcomes)]
    heads = dict.fromkeys(key for line in lines for key in line)
    return [{key: line.get(key) for key in heads} for line in lines]


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best of those that came to their end, whose directories are model directories."""
    return next((outcome for outcome in ranked(outcomes) if outcome.ended == "finished"), None)


def conclude(directory: Path, outcomes: Sequence[Outcome], recipe: Recipe, space: Space) -> None:
    """Write what came of the trials, then remove the large files of all but the best. recipe: before a trial
    changes it."""
    text = io.StringIO()
    lines = table_of(outcomes)
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    checkpoint.write_whole(directory / "report.html", _report(directory.name, outcomes, recipe, space))
    checkpoint.write_whole(directory / CSV, text.getvalue())
    best = best_of(outcomes)
    for outcome in outcomes:
        if outcome.ended != "failed" and (best is None or outcome.trial.number != best.trial.number):
            for name in LARGE:
                path = outcome.trial.directory / name
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """The table, the best first, and where the best is."""
    lines = [{key: _short(value) for key, value in line.items()} for line in table_of(outcomes)]
    heads = [key for key in lines[0] if any(line[key] for line in lines)]
    widths = [max(len(text) for text in (key, *(line[key] for line in lines))) for key in heads]
    for texts in (heads, *([line[key] for key in heads] for line in lines)):
        padded = "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))
        console.print(padded.rstrip(), markup=False)
    best = best_of(outcomes)
    if best is None:
        console.print("no trial came to its end; see the column `problem`", markup=False)
    else:
        console.print(f"the best, trial {best.trial.number}, is in {best.trial.directory}", markup=False)


def _report(title: str, outcomes: Sequence[Outcome], recipe: Recipe, space: Space) -> str:
    plots = draw_trials_plots(outcomes, space)
    table = html_table([{key: _short(value) for key, value in line.items()} for line in table_of(outcomes)])
    body = f"""{table}<h2>Scores</h2>{plots[plots.index("<svg") :]}{_provenance(outcomes)}
{html_text("Recipe", as_yaml(recipe.model_dump(mode="json")))}
{html_text("Space", as_yaml({key: values.plain for key, values in space.items()}))}"""
    return html_page(f"Search {title}", body)


def _provenance(outcomes: Sequence[Outcome]) -> str:
    """Of the best trial, as its own report tells it."""
    best = best_of(outcomes)
    run = best and readable_run(best.trial.directory)
    if not best or not run:
        return ""
    facts = {"Trial": best.trial.number, **provenance(best.trial.directory, run, best.trial.recipe.run.device)}
    return f"<h2>The best</h2>{html_facts(facts)}"


def draw_trials_plots(outcomes: Sequence[Outcome], space: Space) -> str:
    """Scores by step, a curve for each trial; and the best score by each value that was tried. As SVG."""
    import matplotlib  # costs half a second

    matplotlib.use("svg")
    from matplotlib import pyplot

    seen = [outcome for outcome in outcomes if outcome.points]
    name = seen[0].name if seen else "score"
    figure, axes = pyplot.subplots(
        1 + len(space), 1, figsize=(8, 3 * (1 + len(space))), squeeze=False, layout="constrained"
    )
    for outcome in seen:
        axes[0][0].plot(*zip(*outcome.points, strict=True), marker=".", label=f"trial {outcome.trial.number}")
    axes[0][0].set_xlabel("step")
    if 0 < len(seen) <= 12:
        axes[0][0].legend(fontsize="small", frameon=False)
    for (axis,), (key, distribution) in zip(axes[1:], space.items(), strict=True):
        values = [outcome.trial.values[key] for outcome in seen]
        words = distribution.kind == "choice"
        axis.scatter([_short(value) for value in values] if words else values, [outcome.best for outcome in seen])
        if distribution.kind == "log_uniform":
            axis.set_xscale("log")
        axis.set_xlabel(key)
    for (axis,) in axes:
        axis.set_ylabel(f"validation {name}")
        axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return text.getvalue()


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
