"""Rendering: what a model answers -> what a user gets. Labels, offsets, text, and text as it comes.

Knows text on the way out; knows no engine.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from seqmodels.config import ProblemType
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Progress, Request, Scores
from seqmodels.decoding.search import Hypothesis
from seqmodels.errors import NotFiniteError
from seqmodels.reading import Reading
from seqmodels.tokenizer import EOS, Tokenizer


def render_label(labels: Sequence[str], scores: Tensor, threshold: float | None = None) -> dict[str, Any]:
    """scores: probabilities (C,). threshold: below which the best label is too unlikely to be told."""
    label = labels[int(scores.argmax())]
    by_label = dict(zip(labels, scores.tolist(), strict=True))
    return {"label": _unless_unlikely(label, by_label[label], threshold), "score": by_label[label], "scores": by_label}


def render_labels(labels: Sequence[str], scores: Tensor, threshold: float | None = None) -> dict[str, Any]:
    """Those that are at least as likely as the threshold; likelier than not where it is left out. scores: probabilities
    (C, 2) of each label's absence and presence."""
    by_label = dict(zip(labels, scores[:, 1].tolist(), strict=True))
    told = [label for label, p in by_label.items() if (p > 0.5 if threshold is None else p >= threshold)]
    return {"labels": told, "scores": by_label}


def render_numbers(names: Sequence[str], numbers: Tensor, threshold: float | None = None) -> dict[str, Any]:
    """numbers: (K,). They have no probability, so there is no threshold."""
    assert threshold is None
    return {"values": dict(zip(names, numbers.tolist(), strict=True))}


def _unless_unlikely(label: str, score: float, threshold: float | None) -> str | None:
    return None if threshold is not None and score < threshold else label


CLASSIFIED: dict[ProblemType, Callable[[Sequence[str], Tensor, float | None], dict[str, Any]]] = {
    "single_label_classification": render_label,
    "multi_label_classification": render_labels,
    "regression": render_numbers,
}


def render_tags(
    labels: Sequence[str], reading: Reading, scores: Tensor, threshold: float | None = None
) -> dict[str, Any]:
    """A tag per word or step, per span where the labels are BIO. scores: probabilities (S, C). threshold: below which a
    label is too unlikely to be told; its place is."""
    best, indices = scores[list(reading.positions)].max(-1)
    names, chances = [labels[i] for i in indices.tolist()], best.tolist()
    spans = bio_spans(names) if is_bio(labels) else [(name, i, i + 1) for i, name in enumerate(names)]
    tags = []
    for name, first, end in spans:
        start, stop = reading.spans[first][0], reading.spans[end - 1][1]
        score = math.fsum(chances[first:end]) / (end - first)
        tag: dict[str, Any] = {"label": _unless_unlikely(name, score, threshold), "score": score}
        tag |= {"start": start, "end": stop}
        tags.append(tag | {"text": reading.text[start:stop]} if reading.text else tag)
    return {"tags": tags}


def render_score(tokenizer: Tokenizer, reading: Reading, labels: Sequence[int], scored: Scores) -> dict[str, Any]:
    """Log-probabilities (T,) of labels BOS ... EOS; those of a prompt, which is given and not scored, are left out."""
    first = len(reading.prompt)
    nats = scored.values[first:].tolist()
    offsets = [start for start, _ in reading.spans] + [len(reading.text)]
    score = {"score": math.fsum(nats), "logprobs": nats, **_told(tokenizer, labels[1 + first :], offsets)}
    if scored.likeliest:
        tokens, values = scored.likeliest[0][first:].tolist(), scored.likeliest[1][first:].tolist()
        score["top_logprobs"] = _likeliest(tokenizer, map(zip, tokens, values))
    return score


def render_sequence(text: "Text", hypothesis: Hypothesis, tokenizer: Tokenizer, params: SearchParams) -> dict[str, Any]:
    """What was asked for of each generated token stands in lists as long as `tokens`."""
    written = text.of(hypothesis.tokens)
    sequence: dict[str, Any] = {"text": written, "score": hypothesis.score, "finish_reason": hypothesis.finish_reason}
    if params.logprobs or params.top_logprobs or params.output_attentions:
        sequence |= _told(tokenizer, hypothesis.generated, text.offsets(hypothesis.tokens))
    if params.logprobs:
        sequence["logprobs"] = hypothesis.logprobs
    if hypothesis.top_logprobs is not None:
        sequence["top_logprobs"] = _likeliest(tokenizer, hypothesis.top_logprobs)
    if hypothesis.attentions is not None:
        sequence["attentions"] = hypothesis.attentions
    return sequence


def _told(tokenizer: Tokenizer, tokens: Sequence[int], offsets: Sequence[int]) -> dict[str, Any]:
    return {"tokens": [tokenizer.token(i) for i in tokens], "offsets": list(offsets)}


def _likeliest(tokenizer: Tokenizer, steps: Iterable[Iterable[tuple[int, float]]]) -> list[list[dict[str, Any]]]:
    return [[{"token": tokenizer.token(i), "logprob": logprob} for i, logprob in likeliest] for likeliest in steps]


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """Tokens of a request's outputs -> text: without the prompt, with the forced prefix, up to a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        prefix: Sequence[int],
        stops: Sequence[str] = (),
        num_continued: int = 0,
    ) -> None:
        """prefix: prompt and forced prefix. num_continued: how many of the prompt's last tokens are output of a request
        that this one goes on from: a stop string, or a character, may begin in them and end here."""
        self._tokenizer, self._prefix, self._stops = tokenizer, prefix, stops
        before, given = tokenizer.decode(prompt), tokenizer.decode(prefix)
        if num_continued:  # a character that was cut in half is written by who completes it
            before = given = before.rstrip(REPLACEMENT)
        self._prompt_length = len(before)
        self._given = len(given) - len(before)  # characters of the forced prefix
        self._earlier = before[len(tokenizer.decode(prompt[: len(prompt) - num_continued])) :]
        # A token writes a byte or more, so a stop string that was just completed lies within so many tokens.
        self._tail = 4 * max(map(len, stops), default=0) + 4

    def of(self, tokens: Sequence[int]) -> str:
        """tokens: prompt, forced prefix and generated ones."""
        text = self._tokenizer.decode(tokens)[self._prompt_length :]
        return text[: self._given + self._first_stop(text[self._given :])]

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """How many characters of `of` the tokens before each generated one have completed: none of those that it
        leaves out because of a stop string."""
        starts, most = self._tokenizer.starts(tokens), len(self.of(tokens))
        return [min(max(0, start - self._prompt_length), most) for start in starts[len(self._prefix) :]]

    def settled(self, tokens: Sequence[int]) -> str:
        """The beginning of `of` that more tokens cannot change: no half character, nothing that may begin a stop."""
        text = self.of(tokens).rstrip(REPLACEMENT)
        generated = self._earlier + text[self._given :]
        held = max((_overlap(generated, stop) for stop in self._stops), default=0)
        return text[: max(self._given, len(text) - held)]

    def has_stop(self, index: int, generated: Sequence[int]) -> bool:
        """Whether an output holds a stop string; asked after each token, by an engine that knows no text."""
        tail = generated[-self._tail :]
        if len(tail) == len(generated) or min(tail) <= EOS:  # special tokens write nothing
            text = self._tokenizer.decode([*self._prefix, *generated])[self._prompt_length + self._given :]
            return self._first_stop(text) < len(text)
        text = self._tokenizer.decode(tail)
        return any(stop in text for stop in self._stops)

    def _first_stop(self, generated: str) -> int:
        """Where the first stop string begins, or the length of what was generated; 0 where it began before that."""
        whole, earlier = self._earlier + generated, len(self._earlier)
        found = (whole.find(stop, max(0, earlier - len(stop) + 1)) for stop in self._stops)
        return min((max(0, start - earlier) for start in found if start >= 0), default=len(generated))


class Piece(NamedTuple):
    """New characters of one output. told: of a request for logprobs, the tokens that begin in what is sent by now and
    were not told before, in lists as those of `render_sequence`."""

    output: int
    text: str
    told: dict[str, Any] | None


@dataclass
class _Output:
    """What is known of an output; how many of its characters are sent, and how many generated tokens told."""

    tokens: list[int]  # prefix and generated
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    sent: int = 0
    told: int = 0


class TextStream:
    """Events of one request -> what is new of each output. With beams only the best is streamed, as output 0.

    A token is told when all text before it is sent: then where it begins can no longer change either."""

    def __init__(self, tokenizer: Tokenizer, text: Text, request: Request) -> None:
        self._tokenizer, self._text, self._request = tokenizer, text, request
        self._outputs: dict[int, _Output] = {}

    def push(self, event: Progress) -> list[Piece]:
        """Nothing where all is held back. Raises NotFiniteError."""
        output = self._output(event.index)
        output.tokens += event.tokens
        if not all(map(math.isfinite, event.logprobs or [])):
            raise NotFiniteError()
        output.logprobs += event.logprobs or []
        output.top_logprobs += event.top_logprobs or []
        return self._pieces(event.index, self._text.settled(output.tokens))

    def finish(self, result: Sequence[Hypothesis]) -> list[Piece]:
        """What is still missing from each output."""
        pieces = []
        for index, hypothesis in enumerate(result[:1] if self._request.params.num_beams > 1 else result):
            output = self._output(index)
            output.tokens, output.logprobs = hypothesis.tokens, hypothesis.logprobs
            output.top_logprobs = hypothesis.top_logprobs or []
            pieces += self._pieces(index, self._text.of(output.tokens))
        return pieces

    def _output(self, index: int) -> _Output:
        return self._outputs.setdefault(index, _Output(list(self._request.prefix)))

    def _pieces(self, index: int, text: str) -> list[Piece]:
        output = self._outputs[index]
        new, told = text[output.sent :], self._newly_told(output, text)
        output.sent = max(output.sent, len(text))
        return [Piece(index, new, told)] if new or told else []

    def _newly_told(self, output: _Output, text: str) -> dict[str, Any] | None:
        if not self._request.params.logprobs:
            return None
        offsets = self._text.offsets(output.tokens)
        generated = output.tokens[len(output.tokens) - len(offsets) :]
        first, output.told = output.told, min(bisect_right(offsets, len(text)), len(output.logprobs))
        new = slice(first, output.told)
        if first == output.told:
            return None
        told = {**_told(self._tokenizer, generated[new], offsets[new]), "logprobs": output.logprobs[new]}
        if output.top_logprobs:
            told["top_logprobs"] = _likeliest(self._tokenizer, output.top_logprobs[new])
        return told


def is_bio(labels: Sequence[str]) -> bool:
    """Whether all labels are O, B-... or I-..., with at least one B-."""
    return any(label.startswith("B-") for label in labels) and all(re.match(r"O$|[BI]-", label) for label in labels)


def bio_spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, first, end) of each span. As conlleval reads them: an I- after another name begins a span too."""
    spans: list[tuple[str, int, int]] = []
    for i, label in enumerate(labels):
        if label == "O":
            continue
        name = label[2:]
        if label.startswith("I-") and i > 0 and labels[i - 1] in (f"B-{name}", f"I-{name}"):
            spans[-1] = (name, spans[-1][1], i + 1)
        else:
            spans.append((name, i, i + 1))
    return spans


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
