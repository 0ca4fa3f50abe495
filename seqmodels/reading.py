"""Reading: what a user sends -> what a model reads. Text, words, pictures and numbers, each checked.

Knows text and bytes on the way in; knows no engine and no answer.
"""

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqmodels.characters import with_spellings
from seqmodels.clips import extent
from seqmodels.config import FeatureEncoderConfig
from seqmodels.errors import InputError, TooLongError, UnsupportedError
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import Pretrained
from seqmodels.tokenizer import UNK, Tokenizer

WORDS = re.compile(r"\w+|[^\w\s]")  # see `word_spans`
JOINERS = "\u200c\u200d"  # zero-width ones, which stand within words, and within pictures made of several
LARGEST_FEATURE = 1e6  # beyond any scaled series; far larger ones would overflow in a ReLU recurrence
KINDS = ("text", "words", "image", "frames", "features")
TAKES = {
    "text": "a string, or {'text': ...}",
    "words": "a string, {'text': ...} or {'words': [...]}",
    "image": "{'image': FILE}, a picture file as bytes (in JSON: in base64)",
    "frames": "{'frames': [FILE, ...]}, or {'frames': FILE} of an animated one, as bytes (in JSON: in base64)",
    "features": "{'features': [[number, ...], ...]}",
    "nothing": "a prompt string, or nothing",
}
Filled = TypeVar("Filled", bound=Sequence[Any])


@dataclass(frozen=True, eq=False)
class Reading:
    """One input as a model reads it, and what its answer will refer to.

    inputs: without a batch axis, as the encoder takes them; None for a language model, which has a `prompt` instead.
    text, spans, positions are a tagger's: what offsets count in, where each word (or step) stands in it, and at which
    of the model's steps its label stands.
    """

    inputs: Tensor | None = None
    prompt: tuple[int, ...] = ()
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens, frames or steps read; an image counts as one."""
        if self.inputs is None:
            return len(self.prompt)
        return 1 if self.inputs.dim() == 3 else len(self.inputs)


class Reader:
    """Reads for one model. `field` names the request's field in errors; all methods raise InputError."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._config = pretrained.config
        self._pretrained = pretrained

    def read(self, item: Any, field: str, truncate: bool, inside: bool = False) -> Reading:
        """item: as `TAKES` says for this model. Too long is an error unless `truncate`, which keeps the beginning.
        inside: whether the item goes on from another, so that no space is implied before a prompt or a classifier's
        text; what a generator's encoder reads is whole."""
        if isinstance(item, Mapping) and len(item) > 1:
            kinds = ", ".join(map(str, item))[:200]
            raise InputError(f"{field} has {kinds}; an input is exactly one of {', '.join(KINDS)}", param=field)
        if self._config.input == "nothing":
            return Reading(prompt=self._prompt(item, field, truncate, inside))
        if self._config.input == "text" and self._config.architecture == "tagger":
            return self._words(item, field, truncate)
        inputs = self._inputs(item, field, truncate, inside)
        steps = 1 if self._config.input == "image" else len(inputs)
        return Reading(inputs, spans=tuple((i, i + 1) for i in range(steps)), positions=tuple(range(steps)))

    def written(self, text: Any, prompt: tuple[int, ...], field: str, truncate: bool = False) -> tuple[int, ...]:
        """The tokens of a given piece of output: a text to score or a forced prefix, as it stands after a prompt."""
        text = checked_text(text, f"{field} must be a string", field)
        encode = self._target_tokenizer.encode_inside if prompt else self._target_tokenizer.encode
        return self._bounded(tuple(encode(text)), field, truncate)

    def prefix(self, text: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a forced beginning, which the answer returns as they spell it: so none may be <unk>."""
        ids = self.written(text, prompt, "prefix")
        if UNK in ids:
            words = ", ".join(repr(word[:40]) for word in self._target_tokenizer.unknown(text)[:5])
            raise InputError(f"prefix holds what this model cannot write: {words}; choose other words", param="prefix")
        return ids

    def _inputs(self, item: Any, field: str, truncate: bool, inside: bool) -> Tensor:
        kind = self._config.input
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, Mapping) or kind not in item:
            raise UnsupportedError(f"this model takes {TAKES[kind]}", param=field)
        value = item[kind]
        if kind == "text":
            return torch.tensor(self._text(value, field, truncate, inside))
        if isinstance(value, Tensor) and kind in ("image", "frames"):  # preprocessed before, or a backbone's features
            return value if kind == "image" else value[: self._most(len(value), field, truncate)]
        if kind == "image":
            if not isinstance(value, bytes):
                raise InputError("the image must be bytes of an image file", param=field, code="invalid_type")
            return self._preprocessor.image(value, field)
        if kind == "frames" and isinstance(value, bytes):
            return self._clip(value, field, truncate)
        if not isinstance(value, list | tuple):
            raise InputError(f"{kind} must be a list", param=field, code="invalid_type")
        value = self._bounded(tuple(filled(value, kind, field)), field, truncate)
        return self._frames(value, f"{field}.frames") if kind == "frames" else self._features(value, field)

    def _text(self, text: Any, field: str, truncate: bool, inside: bool) -> tuple[int, ...]:
        text = checked_text(text, "the text must be a string", field)
        if self._config.architecture == "generator":
            *ids, end = self._source_tokenizer.encode_source(filled(text, "the text", field))
            return (*self._bounded(tuple(ids), field, truncate), end)
        if inside:  # a piece may be a space alone, which some tokenizers have a token for and some not
            ids = self._source_tokenizer.encode_inside(text)
        else:
            ids = self._source_tokenizer.encode(filled(text, "the text", field))
        return self._bounded(tuple(filled(ids, "the text", field)), field, truncate)

    def _clip(self, data: bytes, field: str, truncate: bool) -> Tensor:
        """The frames of one file. They are counted before any is drawn."""
        frames, _ = extent(data)
        return self._preprocessor.frames(data, field, self._most(frames, field, truncate))

    def _frames(self, pictures: Sequence[Any], field: str) -> Tensor:
        """Each a picture. Of an animated one all frames but the first would be lost."""
        for i, picture in enumerate(pictures):
            if isinstance(picture, bytes) and (count := extent(picture)[0]) > 1:
                message = (
                    f"frames[{i}] is a file of {count} frames; give it in place of the list, or each of its frames"
                )
                raise InputError(message, param=f"{field}[{i}]", code="invalid_image")
        return self._preprocessor.frames(pictures, field)

    def _features(self, rows: Sequence[Any], field: str) -> Tensor:
        assert isinstance(self._config.encoder, FeatureEncoderConfig)
        size = self._config.encoder.feature_size
        if size == 1:  # as training reads them
            rows = [[row] if isinstance(row, int | float) else row for row in rows]
        for step, row in enumerate(rows):
            if not isinstance(row, list | tuple) or len(row) != size:
                raise InputError(f"features[{step}] must be a list of {size} numbers", param=field)
            if not all(isinstance(x, int | float) and abs(x) <= LARGEST_FEATURE for x in row):
                raise InputError(
                    f"features[{step}] holds something that is no number within ±{LARGEST_FEATURE:,.0f}", param=field
                )
        return torch.tensor(rows, dtype=torch.float32)

    def _words(self, item: Any, field: str, truncate: bool) -> Reading:
        """A text cut into words, or words given; each labelled at its last piece."""
        if isinstance(item, Mapping) and "words" in item:
            words = item["words"]
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
                raise InputError(
                    "words must be a list of strings, none of them empty", param=field, code="invalid_type"
                )
            text, spans = checked_text(" ".join(words), "", field), spans_of(words)
        else:
            given = item.get("text") if isinstance(item, Mapping) else item
            text = checked_text(given, f"this model takes {TAKES['words']}", field)
            spans = word_spans(text)
        filled(spans, "the text", field)
        ids, positions = self._source_tokenizer.encode_words([text[start:end] for start, end in spans])
        ids = list(self._bounded(tuple(ids), field, truncate))
        positions = [position for position in positions if position < len(ids)]
        inputs = torch.tensor(ids)
        if characters := self._config.characters:
            words = [text[start:end] for start, end in spans]
            inputs = with_spellings(ids, positions, words, characters.max_length)
        return Reading(inputs, (), text, tuple(spans[: len(positions)]), tuple(positions))

    def _prompt(self, item: Any, field: str, truncate: bool, inside: bool) -> tuple[int, ...]:
        text = checked_text(_prompt_text(item), f"this model takes {TAKES['nothing']}", field)
        tokenizer = self._target_tokenizer
        ids = tuple(tokenizer.encode_inside(text) if inside else tokenizer.encode(text))
        # What is nearest to the continuation matters most, so a prompt loses its beginning, not its end.
        return ids[-self._config.max_source_length :] if truncate else self._bounded(ids, field, truncate)

    def _bounded(self, items: tuple[Any, ...], field: str, truncate: bool) -> tuple[Any, ...]:
        return items[: self._most(len(items), field, truncate)]

    def _most(self, positions: int, field: str, truncate: bool) -> int:
        """How many of them are read."""
        limit = self._config.max_source_length
        if positions > limit and not truncate:
            advice = "" if field.startswith(("prefix", "prompt")) else " or set truncate"
            raise TooLongError(
                f"{field} has {positions} positions, but this model takes at most {limit}; shorten it{advice}",
                param=field,
            )
        return min(positions, limit)

    @property
    def _source_tokenizer(self) -> Tokenizer:
        assert self._pretrained.source_tokenizer is not None
        return self._pretrained.source_tokenizer

    @property
    def _target_tokenizer(self) -> Tokenizer:
        assert self._pretrained.target_tokenizer is not None
        return self._pretrained.target_tokenizer

    @property
    def _preprocessor(self) -> Preprocessor:
        assert self._pretrained.preprocessor is not None
        return self._pretrained.preprocessor


def word_spans(text: str) -> list[tuple[int, int]]:
    """How a tagger splits a text that comes without words: at blanks, and around each sign that is no letter, digit or
    underscore. Marks and joiners belong to what they touch; Python's \\w knows them for no letters."""
    spans: list[tuple[int, int]] = []
    for match in WORDS.finditer(text):
        start, end = match.span()
        if spans and spans[-1][1] == start and _is_one(text[start - 1], text[start]):
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    return spans


def _is_one(last: str, first: str) -> bool:
    """Whether what ends with the one character goes on with the other."""
    if last in JOINERS or first in JOINERS or _is_mark(first):
        return True
    return _is_mark(last) and (first.isalnum() or first == "_")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def spans_of(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where each word stands in the words joined by spaces."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return [(end - 1 - len(word), end - 1) for end, word in zip(ends, words, strict=True)]


def checked_text(text: Any, otherwise: str, field: str) -> str:
    """The text, if it is one that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UnsupportedError(otherwise, param=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text holds half of a surrogate pair, which is no character", param=field) from None
    return text


def filled(value: Filled, what: str, field: str) -> Filled:
    """The text or list, if there is more in it than spaces. Raises InputError."""
    if not value or (isinstance(value, str) and value.isspace()):
        raise InputError(f"{what} is empty", param=field, code="empty")
    return value


def _prompt_text(item: Any) -> Any:
    """None, which is no text, where the item is something else."""
    return item.get("text") if isinstance(item, Mapping) else "" if item is None else item
