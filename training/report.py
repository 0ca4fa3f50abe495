"""report.html: what a finished run looks like, in one file that a person would open."""

import html
import io
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from seqmodels.pretrained import RECIPE
from training.data.rows import in_order
from training.directory import RunFile

RATIO = "update to weights"
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
    "validation/bleu_4": ("validation, of 100", "BLEU-4"),
    "validation/rouge_l": ("validation, of 100", "ROUGE-L"),
    "validation/cider_d": ("validation, of 1000", "CIDEr-D"),
    "validation/bits_per_character": ("validation, bits", "bits per character"),
    "validation/micro_f1": ("validation, of 1", "micro F1"),
    "validation/r2": ("validation, of 1", "R²"),
    "validation/mse": ("validation, error", "mean square error"),
    "validation/mae": ("validation, error", "mean absolute error"),
    "learning_rate": ("learning rate", "learning rate"),
    "gradient_norm": ("gradient", "norm before clipping"),
    "update_to_weight_ratio": (RATIO, "length of the update / of the weights"),
    "tokens_per_second": ("throughput", "tokens a second"),
}
USUAL_RATIO = 1e-3  # Goodfellow et al. 2016, section 11.5: about what an update should move the weights by
PANELS_IN_A_ROW = 3
MAX_LABELS = 30  # in a table of confusions


Confusion = Mapping[str, Mapping[str, int]]  # expected label -> given label -> how often


def write_report(
    directory: Path,
    title: str,
    facts: Mapping[str, object],
    recipe: str,
    samples: Sequence[Mapping[str, str]] = (),
    confusion: Confusion = MappingProxyType({}),
    kinds: Sequence[Mapping[str, str]] = (),
) -> None:
    """Curves are drawn from metrics.jsonl and timings.jsonl. recipe: as YAML. The others: see `Evaluation`."""
    curves = draw_curves([*_lines(directory / "metrics.jsonl"), *_lines(directory / "timings.jsonl")])
    (directory / "curves.svg").write_text(curves, encoding="utf-8")
    tables = _table("Each kind of span", kinds), _confusion_table(confusion), _table("What it says", samples)
    body = f"""{html_facts(facts)}<h2>Curves</h2>{curves[curves.index("<svg") :]}
{"".join(tables)}{html_text("Recipe", recipe)}"""
    (directory / "report.html").write_text(html_page(title, body), encoding="utf-8")


def provenance(directory: Path, run: RunFile, device: str) -> dict[str, str]:
    """What made a run what it is, and how to make it again: to the bit, on the same machine."""
    return {
        "Rows": f"sha256 {run.data}",
        "Made with": f"torch {run.torch}, Python {platform.python_version()}, threads: {run.threads}",
        **({"Processor": _processor(device)} if _is_here(device) else {}),
        "Again": f"python -m training train {shlex.quote(str(directory / RECIPE))} run.output_dir=NEW_DIRECTORY",
    }


def _is_here(device: str) -> bool:
    """A search may be told of on another machine than its trials ran on."""
    return device == "cpu" or torch.cuda.is_available()


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return torch.backends.cpu.get_cpu_capability() + ", " + (_model_of_processor() or platform.machine())


def _model_of_processor() -> str:
    """As Linux names it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


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
    """Loss, validation scores, learning rate, gradient norm, updates and throughput over steps, as SVG."""
    import matplotlib  # costs half a second, and only the end of a run needs it

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    smoothed = any(line.get("loss") != line.get("nll") for line in lines)
    for line in lines:
        for name, value in numbers(line):
            if name in CURVES and (smoothed or name != "loss"):
                panel, label = CURVES[name]
                panels.setdefault(panel, {}).setdefault(label, []).append((line["step"], value))
    names = sorted(panels, key=[panel for panel, _ in CURVES.values()].index)
    columns = min(len(names), PANELS_IN_A_ROW)
    rows = -(-len(names) // columns)
    width, height = 4 * columns, 3 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # By hand: matplotlib's own layouts draw everything twice.
    sides = {"left": 0.7 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    figure.subplots_adjust(**sides, wspace=0.28, hspace=0.45)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        if name == RATIO:
            axis.axhline(USUAL_RATIO, color="grey", linewidth=0.8, linestyle="--", label="about right")
            axis.set_yscale("log")
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


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _confusion_table(confusion: Confusion) -> str:
    """Rows: expected. Columns: given. The darker, the larger a share of its row. The most frequent labels."""
    if not confusion:
        return ""
    frequent = sorted(confusion, key=lambda label: -sum(confusion[label].values()))[:MAX_LABELS]
    labels = sorted(frequent, key=in_order)
    others = {name for row in confusion.values() for name in row} - confusion.keys()
    given = [*labels, *sorted(others, key=in_order)][:MAX_LABELS]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in given)
    rows = ""
    for label in labels:
        total = sum(confusion[label].values())
        counts = [confusion[label].get(name, 0) for name in given]
        cells = "".join(f'<td style="background:rgba(31,119,180,{n / total:.2f})">{n or ""}</td>' for n in counts)
        rows += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    return f"<h2>Which label for which</h2><table><tr><th>expected \\ given</th>{head}</tr>{rows}</table>"


def _table(title: str, lines: Sequence[Mapping[str, str]]) -> str:
    return f"<h2>{title}</h2>{html_table(lines)}" if lines else ""


def html_facts(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items()
    )
    return f"<table>{rows}</table>"


def html_text(title: str, text: str) -> str:
    """Such as a recipe, as it stands in its file."""
    return f"<h2>{title}</h2><pre>{html.escape(text)}</pre>"


def html_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines that all have the keys of the first."""
    heads = list(lines[0])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(row[name])}</td>' for name in heads)}</tr>" for row in lines)
    return f"<table><tr>{head}</tr>{rows}</table>"


def numbers(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, value) of all that is worth a curve."""
    flat = {**line, **{f"validation/{name}": value for name, value in line.get("validation", {}).items()}}
    return [
        (name, float(value))
        for name, value in flat.items()
        if isinstance(value, int | float) and name not in ("step", "best")
    ]
