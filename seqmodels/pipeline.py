"""Pipeline: raw input -> result. The only place that knows text and bytes.

A request goes through four calls: `prepare` (tokenize or preprocess, check), `submit`, `step` until its event comes,
`render` (text, labels, offsets). The command line, evaluation and serving all use these, so what is evaluated is what
is served. `prepare` and `render` may be called from any thread; the others belong to one.
"""

import itertools
import json
import math
import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from seqmodels.config import FeatureEncoderConfig, explain
from seqmodels.decoding.engine import ROW_FLOOR, Engine, Event, Failed, Finished, Progress, Request
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.search import Hypothesis
from seqmodels.errors import InputError, TooLongError, UnsupportedError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import SequenceGenerator
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import Pretrained, load_pretrained
from seqmodels.selftest import find_row_floor
from seqmodels.tokenizer import BOS, EOS, Detokenizer, Tokenizer

WORDS = re.compile(r"\w+|[^\w\s]")  # how a tagger splits a text that comes without words
KINDS = {"text": "a string, or {'text': ...}", "image": "{'image': bytes}", "frames": "{'frames': [bytes, ...]}",
         "features": "{'features': [[number, ...], ...]}", "nothing": "a prompt string, or nothing"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Job:
    """A prepared request, and what rendering its result will need."""

    request: Request | ForwardRequest
    num_input_tokens: int
    prompt: tuple[int, ...] = ()  # a language model's: read, but no part of the answer
    text: str = ""  # a tagger's: what the offsets count in
    spans: tuple[tuple[int, int], ...] = ()  # of each word in that text
    positions: tuple[int, ...] = ()  # where each word's label stands among the steps
    params: SearchParams = dataclass_field(default_factory=SearchParams)

    @property
    def id(self) -> str:
        return self.request.id


class Pipeline:
    """A loaded model directory, ready to answer."""

    def __init__(self, pretrained: Pretrained, name: str = "model", max_rows: int = 256) -> None:
        self.name = name
        self.config = pretrained.config
        self.revision = pretrained.revision
        self._pretrained = pretrained
        floor = find_row_floor(pretrained.model)
        self.batch_invariant = floor is not None
        self._forward = Forward(pretrained.model, row_floor=floor or ROW_FLOOR)
        self._engine = None
        if isinstance(pretrained.model, SequenceGenerator):
            self._engine = Engine(pretrained.model, max_rows, row_floor=floor or ROW_FLOOR)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", max_rows: int = 256
    ) -> "Pipeline":
        """Raises ModelDirectoryError."""
        return cls(load_pretrained(directory, device), Path(directory).resolve().name, max_rows)

    @property
    def task(self) -> str:
        return self.config.task

    # -- text and bytes in ---------------------------------------------------------------------------------------

    def prepare(
        self,
        item: Any,
        params: Mapping[str, Any] | None = None,
        *,
        field: str = "inputs",
        truncate: bool = False,
        stream: bool = False,
        deadline: float | None = None,
    ) -> Job:
        """Check one input and turn it into tensors.

        item: a string, {"text"}, {"words"}, {"image": bytes}, {"frames": [bytes]} or {"features": [[...]]}, as the
        model takes; None or a prompt for a language model. params: options of SearchParams over the model's defaults.
        deadline: a time.monotonic(). Raises InputError, whose `param` is `field` or the option at fault.
        """
        if self._engine is None:
            if params:
                name = next(iter(params))
                raise InputError(f"{name} is an option of generators, and this model answers with labels", param=name)
            return self._prepare_labels(item, field, truncate, deadline)
        search = self._search_params(params or {})
        prompt: tuple[int, ...] = ()
        inputs = None
        if self.config.input == "nothing":
            prompt = self._prompt(item, field, truncate)
        else:
            inputs = self._inputs(item, field, truncate)
        prefix = self._prefix(prompt, search)
        request = Request(
            uuid.uuid4().hex,
            inputs,
            search,
            prefix,
            tuple(self._bad_words(search)),
            secrets.randbits(63) if search.seed is None else search.seed,
            stream,
            self._stop_watch(prefix, search) if search.stop else None,
            deadline,
        )
        return Job(request, len(prompt) if inputs is None else len(inputs), prompt, params=search)

    def prepare_score(
        self, item: Any, target: str, *, field: str = "inputs", truncate: bool = False, deadline: float | None = None
    ) -> Job:
        """A request for the log-probability of `target`, given the input (or the prompt). Raises InputError."""
        if self._engine is None:
            raise InputError("this model answers with labels; only a generator can score a text", param=field)
        target = _checked(target, "the target must be a string", "targets")
        prompt: tuple[int, ...] = ()
        inputs = None
        if self.config.input == "nothing":
            prompt = self._prompt(item, field, truncate)
            written = self._target_tokenizer.encode(_prompt_text(item) + target)
        else:
            inputs = self._inputs(item, field, truncate)
            written = self._target_tokenizer.encode(target)
        labels = self._bounded((BOS, *written, EOS), "targets", truncate)
        request = ForwardRequest(uuid.uuid4().hex, inputs, labels, deadline)
        return Job(request, len(labels) - 2 + (0 if inputs is None else len(inputs)), prompt)

    def _search_params(self, given: Mapping[str, Any]) -> SearchParams:
        """The request's options over the model's defaults, less sampling's where it searches, and the reverse."""
        defaults = self._pretrained.generation.model_dump(exclude_defaults=True)
        if given.get("do_sample", defaults.get("do_sample", False)) != defaults.get("do_sample", False):
            other = (
                "num_beams",
                "num_return_sequences",
                "early_stopping",
                "length_penalty",
                "temperature",
                "top_k",
                "top_p",
            )
            defaults = {name: value for name, value in defaults.items() if name not in other}
        try:
            return SearchParams.model_validate_json(json.dumps({**defaults, **given}))
        except ValidationError as error:
            where = error.errors(include_url=False)[0]["loc"]
            raise InputError(explain(error), param=str(where[0]) if where else None) from None

    def _prepare_labels(self, item: Any, field: str, truncate: bool, deadline: float | None) -> Job:
        if self.config.input == "text" and self.config.architecture == "tagger":
            text, spans = self._words(item, field)
            words = [text[start:end] for start, end in spans]
            ids, positions = self._source_tokenizer.encode_words(words)
            inputs = torch.tensor(self._bounded(tuple(ids), field, truncate))
            kept = sum(position < len(inputs) for position in positions)
            request = ForwardRequest(uuid.uuid4().hex, inputs, (), deadline)
            return Job(request, len(inputs), (), text, tuple(spans[:kept]), tuple(positions[:kept]))
        inputs = self._inputs(item, field, truncate)
        steps = len(inputs) if self.config.input != "image" else 1
        request = ForwardRequest(uuid.uuid4().hex, inputs, (), deadline)
        return Job(request, steps, (), "", tuple((i, i + 1) for i in range(steps)), tuple(range(steps)))

    def _inputs(self, item: Any, field: str, truncate: bool) -> Tensor:
        """The tensor an encoder reads, without its batch axis."""
        kind = self.config.input
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, Mapping) or kind not in item:
            raise UnsupportedError(f"this model takes {KINDS[kind]}", param=field)
        value = item[kind]
        if kind == "text":
            return torch.tensor(self._text_ids(value, field, truncate))
        if kind == "image":
            if not isinstance(value, bytes):
                raise InputError("the image must be bytes of an image file", param=field, code="invalid_type")
            return self._preprocessor.image(value, field)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise InputError(f"{kind} must be a list", param=field, code="invalid_type")
        if not value:
            raise InputError(f"{kind} is empty", param=field, code="empty")
        value = self._bounded(tuple(value), field, truncate)
        return self._preprocessor.frames(value, field) if kind == "frames" else self._features(value, field)

    def _text_ids(self, text: Any, field: str, truncate: bool) -> tuple[int, ...]:
        text = _checked(text, "the text must be a string", field)
        if not text.strip():
            raise InputError("the text is empty", param=field, code="empty")
        if self._engine is None:
            return self._bounded(tuple(self._source_tokenizer.encode(text)), field, truncate)
        return (*self._bounded(tuple(self._source_tokenizer.encode_source(text)[:-1]), field, truncate), EOS)

    def _features(self, rows: Sequence[Any], field: str) -> Tensor:
        assert isinstance(self.config.encoder, FeatureEncoderConfig)
        size = self.config.encoder.feature_size
        for step, row in enumerate(rows):
            if not isinstance(row, Sequence) or len(row) != size:
                raise InputError(f"features[{step}] must be a list of {size} numbers", param=field)
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in row):
                raise InputError(f"features[{step}] holds something that is no finite number", param=field)
        values = torch.tensor(rows, dtype=torch.float32)
        if not values.isfinite().all():
            raise InputError("features hold a number too large for 32 bits", param=field)
        return values

    def _words(self, item: Any, field: str) -> tuple[str, list[tuple[int, int]]]:
        """The text that offsets count in, and where its words stand."""
        if isinstance(item, Mapping) and "words" in item:
            words = item["words"]
            if (
                not isinstance(words, Sequence)
                or not all(isinstance(w, str) and w for w in words)
                or isinstance(words, str)
            ):
                raise InputError(
                    "words must be a list of strings, none of them empty", param=field, code="invalid_type"
                )
            text, spans = _checked(" ".join(words), "", field), _spans(words)
        else:
            given = item.get("text") if isinstance(item, Mapping) else item
            text = _checked(given, "this model takes a string, {'text': ...} or {'words': [...]}", field)
            spans = [match.span() for match in WORDS.finditer(text)]
        if not spans:
            raise InputError("the text is empty", param=field, code="empty")
        return text, spans

    def _prompt(self, item: Any, field: str, truncate: bool) -> tuple[int, ...]:
        text = _checked(_prompt_text(item), f"this model takes {KINDS['nothing']}", field)
        ids = tuple(self._target_tokenizer.encode(text))
        # What is nearest to the continuation matters most, so a prompt loses its beginning, not its end.
        limit = self.config.max_source_length
        return ids[-limit:] if truncate else self._bounded(ids, field, truncate)

    def _bounded(self, items: tuple[Any, ...], field: str, truncate: bool) -> tuple[Any, ...]:
        limit = self.config.max_source_length
        if len(items) > limit and not truncate:
            raise TooLongError(
                f"the input has {len(items)} positions, but this model takes at most {limit}; shorten it "
                "or set truncate",
                param=field,
            )
        return items[:limit]

    def _prefix(self, prompt: tuple[int, ...], search: SearchParams) -> tuple[int, ...]:
        if not search.prefix:
            return prompt
        if prompt:
            return (*prompt, *self._target_tokenizer.encode_inside(search.prefix))
        return tuple(self._target_tokenizer.encode(search.prefix))

    def _bad_words(self, search: SearchParams) -> list[tuple[int, ...]]:
        """Each as it is spelt at the start of a word, and inside one."""
        spellings = []
        for word in search.bad_words:
            for ids in (self._target_tokenizer.encode(word), self._target_tokenizer.encode_inside(word)):
                if ids and tuple(ids) not in spellings:
                    spellings.append(tuple(ids))
        return spellings

    # -- the work ------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a prepared request; exactly one Finished or Failed event will name it, unless it is cancelled."""
        if isinstance(job.request, ForwardRequest):
            self._forward.submit(job.request)
        else:
            assert self._engine is not None
            self._engine.submit(job.request)

    def step(self) -> list[Event]:
        """Turn once: a forward pass for those who wait for one, a token for those who generate."""
        events = self._forward.step() if self._forward.has_work else []
        if self._engine and self._engine.has_work:
            events += self._engine.step()
        return events

    def cancel(self, request_id: str) -> None:
        self._forward.cancel(request_id)
        if self._engine:
            self._engine.cancel(request_id)

    @property
    def has_work(self) -> bool:
        return self._forward.has_work or bool(self._engine and self._engine.has_work)

    def load(self) -> dict[str, int]:
        """How busy it is: requests waiting, decoder rows in use and in all."""
        waiting = self._forward.num_waiting + (self._engine.num_waiting if self._engine else 0)
        rows = (self._engine.num_rows, self._engine.max_rows) if self._engine else (0, 0)
        return {"waiting": waiting, "rows_live": rows[0], "rows_total": rows[1]}

    def warm_up(self) -> dict[str, Any]:
        """What the self-test at load found; it also ran every kernel once."""
        return {"batch_invariant": self.batch_invariant}

    # -- results out ---------------------------------------------------------------------------------------------

    def render(self, job: Job, result: list[Hypothesis] | Tensor) -> dict[str, Any]:
        """The answer as plain data: label and scores, tags, sequences, or log-probabilities."""
        if isinstance(result, list):
            return self._render_sequences(job, result)
        if self._engine:
            return self._render_score(job, result)
        if self.config.architecture == "classifier":
            scores = dict(zip(self.config.labels, result.tolist(), strict=True))
            label = self.config.labels[int(result.argmax())]
            return {"label": label, "score": scores[label], "scores": scores}
        return {"tags": self._tags(job, result)}

    def num_output_tokens(self, job: Job, result: list[Hypothesis] | Tensor) -> int:
        """Tokens written (or scored), or labels given."""
        if isinstance(result, list):
            return sum(len(hypothesis.logprobs) for hypothesis in result)
        return len(result) if self._engine else max(1, len(job.positions))

    def text_stream(self, job: Job) -> "TextStream":
        assert isinstance(job.request, Request)
        return TextStream(self, job)

    def text(self, job: Job, hypothesis: Hypothesis) -> str:
        """What a hypothesis says: the forced prefix and the generated text, up to a stop string."""
        whole = self._target_tokenizer.decode(hypothesis.tokens)[len(self._target_tokenizer.decode(job.prompt)) :]
        if hypothesis.finish_reason != "stop":
            return whole
        given = len(self._target_tokenizer.decode(_request(job).prefix)) - len(
            self._target_tokenizer.decode(job.prompt)
        )
        return whole[: given + first_stop(whole[given:], job.params.stop)]

    def _render_sequences(self, job: Job, result: list[Hypothesis]) -> dict[str, Any]:
        sequences = []
        for hypothesis in result:
            sequence: dict[str, Any] = {
                "text": self.text(job, hypothesis),
                "score": hypothesis.score,
                "finish_reason": hypothesis.finish_reason,
            }
            if job.params.logprobs:
                sequence["tokens"] = [self._target_tokenizer.token(i) for i in hypothesis.generated]
                sequence["logprobs"] = hypothesis.logprobs
            sequences.append(sequence)
        answer: dict[str, Any] = {"sequences": sequences}
        if job.params.do_sample:
            answer["seed"] = _request(job).seed
        return answer

    def _render_score(self, job: Job, result: Tensor) -> dict[str, Any]:
        """Log-probabilities of the target alone; a prompt is given, not scored."""
        assert isinstance(job.request, ForwardRequest)
        first = len(job.prompt)
        logprobs = result[first:].tolist()
        tokens = [self._target_tokenizer.token(i) for i in job.request.labels[1 + first :]]
        return {"score": math.fsum(logprobs), "logprobs": logprobs, "tokens": tokens}

    def _tags(self, job: Job, result: Tensor) -> list[dict[str, Any]]:
        """A tag per word or step; spans where the labels are BIO."""
        scores, indices = result[list(job.positions)].max(-1)
        labels = [self.config.labels[i] for i in indices.tolist()]
        words = list(zip(labels, scores.tolist(), job.spans, strict=True))
        if is_bio(self.config.labels):
            return [_tag(job, label, words[first:end]) for label, first, end in bio_spans(labels)]
        return [_tag(job, label, [word]) for label, word in zip(labels, words, strict=True)]

    def _stop_watch(self, prefix: tuple[int, ...], search: SearchParams) -> Any:
        given = len(self._target_tokenizer.decode(prefix))

        def watch(index: int, tokens: Sequence[int]) -> bool:
            text = self._target_tokenizer.decode([*prefix, *tokens])[given:]
            return any(stop in text for stop in search.stop)

        return watch

    # -- offline -------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Sequence[Any], **params: Any) -> list[dict[str, Any]]:
        """Answers in order. Raises InputError, which names the item as inputs[i]."""
        return self.run([self.prepare(item, params, field=f"inputs[{i}]") for i, item in enumerate(inputs)])

    def score(self, inputs: Sequence[Any], targets: Sequence[str]) -> list[dict[str, Any]]:
        """The log-probability of each target given its input (None for a language model)."""
        pairs = zip(inputs, targets, strict=True)
        return self.run(
            [self.prepare_score(item, target, field=f"inputs[{i}]") for i, (item, target) in enumerate(pairs)]
        )

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Submit, turn until there is no work, render. Raises what a job failed with."""
        by_id = {job.id: job for job in jobs}
        answers: dict[str, dict[str, Any]] = {}
        for job in jobs:
            self.submit(job)
        while self.has_work:
            for event in self.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    answers[event.request_id] = self.render(by_id[event.request_id], event.result)
        return [answers[job.id] for job in jobs]

    # -- the parts that this model has ---------------------------------------------------------------------------

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


class TextStream:
    """Events of one request -> new characters of each output. Held back: half characters, and what may begin a stop.

    With beams only the best sequence is streamed, as output 0.
    """

    def __init__(self, pipeline: Pipeline, job: Job) -> None:
        self._pipeline = pipeline
        self._job = job
        self._detokenizers: dict[int, Detokenizer] = {}
        self._text: dict[int, str] = {}  # by output, all that is known
        self._sent: dict[int, int] = {}  # by output, characters sent

    def push(self, event: Progress) -> list[tuple[int, str]]:
        """(output index, new characters), nothing where all is held back."""
        index = event.index
        if index not in self._detokenizers:
            self._begin(index)
        self._text[index] += self._detokenizers[index].push(event.tokens)
        stops = self._job.params.stop
        known = self._text[index]
        safe = min([first_stop(known, stops), *(len(known) - _overlap(known, stop) for stop in stops)])
        return self._deltas(index, known[:safe])

    def finish(self, result: list[Hypothesis]) -> list[tuple[int, str]]:
        """What is still missing from each output's final text."""
        outputs = result[:1] if self._job.params.num_beams > 1 else result
        return [
            delta
            for index, hypothesis in enumerate(outputs)
            for delta in self._deltas(index, self._pipeline.text(self._job, hypothesis))
        ]

    def _begin(self, index: int) -> None:
        tokenizer = self._pipeline._target_tokenizer
        detokenizer = Detokenizer(tokenizer)
        detokenizer.push(self._job.prompt)
        self._detokenizers[index] = detokenizer
        self._text[index] = detokenizer.push(_request(self._job).prefix[len(self._job.prompt) :])

    def _deltas(self, index: int, text: str) -> list[tuple[int, str]]:
        new = text[self._sent.get(index, 0) :]
        self._sent[index] = max(self._sent.get(index, 0), len(text))
        return [(index, new)] if new else []


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
        follows = label.startswith("I-") and i > 0 and labels[i - 1] != "O" and labels[i - 1][2:] == name
        if follows:
            spans[-1] = (name, spans[-1][1], i + 1)
        else:
            spans.append((name, i, i + 1))
    return spans


def first_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins, or the length of the text."""
    return min([found for stop in stops if (found := text.find(stop)) >= 0], default=len(text))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _tag(job: Job, label: str, words: Sequence[tuple[str, float, tuple[int, int]]]) -> dict[str, Any]:
    """One tag over neighbouring words; its score is the mean of theirs."""
    start, end = words[0][2][0], words[-1][2][1]
    score = math.fsum(score for _, score, _ in words) / len(words)
    tag = {"label": label, "score": score, "start": start, "end": end}
    return {**tag, "text": job.text[start:end]} if job.text else tag


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where each word stands in the words joined by spaces."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return [(end - 1 - len(word), end - 1) for end, word in zip(ends, words, strict=True)]


def _checked(text: Any, otherwise: str, field: str) -> str:
    """The text, if it is one that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UnsupportedError(otherwise, param=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text holds half of a surrogate pair, which is no character", param=field) from None
    return text


def _prompt_text(item: Any) -> Any:
    return item.get("text", "") if isinstance(item, Mapping) else "" if item is None else item


def _request(job: Job) -> Request:
    assert isinstance(job.request, Request)
    return job.request
