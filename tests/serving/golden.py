"""What is asked while a service goes through something, and what is right: the answers of the library alone."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from seqmodels.pipeline import Pipeline

TEXTS = ("a good day", "bad weather", "x" * 30, "Grüße", "日本", "one two three", "it rains in the north")
SEARCH = {"num_beams": 4, "max_new_tokens": 20}
SAMPLE = {"do_sample": True, "seed": 3, "max_new_tokens": 40, "min_new_tokens": 40}
FIELDS: dict[str, dict[str, Any]] = {"mood": {}, "names": {}, "en-de": SEARCH, "story": SAMPLE}
PATHS = {"mood": "classify", "names": "tag", "en-de": "translate", "story": "generate"}


class Golden:
    """The answers of each revision of each model."""

    def __init__(self, models: Mapping[str, Iterable[str]]) -> None:
        """models: name -> directories, a revision each."""
        self._answers: dict[tuple[str, str], list[Any]] = {}
        for name, directories in models.items():
            for pipeline in map(Pipeline.from_pretrained, directories):
                answers = pipeline(TEXTS, **FIELDS[name])
                self._answers[name, pipeline.revision] = json.loads(json.dumps(answers))

    def is_right(self, name: str, inputs: str | list[str], answer: dict[str, Any]) -> bool:
        known = self._answers.get((name, answer["revision"]))
        texts = [inputs] if isinstance(inputs, str) else inputs
        return known is not None and bool(answer["results"] == [known[TEXTS.index(text)] for text in texts])
