"""Small recipes that tests train, as plain mappings."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Recipe
from training.data.rows import Row
from training.parsing import parse_recipe

TEXT_ENCODER = {"input": "text", "embedding_size": 16, "recurrent": {"cell": "gru", "hidden_size": 16}}
CLASSIFIER = {"architecture": "classifier", "encoder": TEXT_ENCODER}
TAGGER = {"architecture": "tagger", "encoder": TEXT_ENCODER}
DECODER = {"embedding_size": 16, "recurrent": {"cell": "gru", "hidden_size": 16}}
TRANSLATOR = {"architecture": "generator", "encoder": TEXT_ENCODER, "decoder": {**DECODER, "attention": "dot"}}
LANGUAGE_MODEL = {"architecture": "generator", "decoder": DECODER}
WORDS = {"kind": "word", "vocab_size": 300}


def fields(task: str = "classify", directory: Path | None = None, **sections: Any) -> dict[str, Any]:
    """A recipe of two steps on generated reviews; sections replace or extend its own."""
    made: dict[str, Any] = {
        "task": task,
        "data": {"generated": "sentiment", "tokenizer": WORDS},
        "model": CLASSIFIER,
        "run": {"max_steps": 2, "threads": 1, "output_dir": str(directory) if directory else None},
    }
    run = {**made["run"], **sections.pop("run", {})}
    return {**made, **sections, "run": run}


def recipe(task: str = "classify", directory: Path | None = None, **sections: Any) -> Recipe:
    return parse_recipe(fields(task, directory, **sections))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A CSV with columns `input`, where there is one, and `target`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target"] if rows[0].input is None else ["input", "target"])
        writer.writerows([row.target] if row.input is None else [row.input, row.target] for row in rows)
