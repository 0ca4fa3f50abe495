"""The OpenAI completions protocol: its request, its answers, and the one mapping onto our search options.

Known fields that we cannot honour are accepted at their neutral value and refused by name at any other; unknown
fields are ignored, on this route alone, because clients of that protocol send many.
"""

import time
import uuid
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from seqmodels.config import Strict
from seqmodels.decoding.params import TOP_LOGPROBS
from seqmodels.errors import InputError
from serving.errors import shown
from serving.schema import OneOrMany

# What each field must be, where being anything else would change an answer in a way that we do not offer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
LEAST_TEMPERATURE = 0.001  # of a search; what is lower is as good as greedy
FINISH_REASONS = {"eos": "stop", "stop": "stop", "constraint": "stop", "length": "length"}


class StreamOptions(Strict):
    include_usage: bool | None = False
    model_config = ConfigDict(extra="ignore")


class CompletionRequest(Strict):
    """A request for completions, with OpenAI's defaults.

    `best_of` samples so many candidates and answers the `n` with the highest log-probability per token, best first.
    With `temperature` 0 the search is greedy, and all `n` answers are the same. `logprobs` may be 0: those of the
    chosen tokens. `echo`, of a language model, puts the prompt before each answer; with `max_tokens` 0 there is nothing
    else, so that with `logprobs` the prompt is scored.
    """

    model: str | None = None
    prompt: OneOrMany | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    best_of: Annotated[int, Field(ge=1)] | None = None
    stop: OneOrMany | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"example": {"prompt": "Once upon a", "max_tokens": 32, "temperature": 0.8, "seed": 7}},
    )

    @property
    def prompts(self) -> list[str]:
        """The text of each prompt; an empty one where none is given."""
        given = self.prompt or ""
        return [given] if isinstance(given, str) else given

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Answers that are chosen from."""
        return max(self.num_choices, self.best_of or 0)

    @property
    def samples(self) -> bool:
        return self.temperature is None or self.temperature > 0

    @property
    def writes(self) -> bool:
        """Whether more is wanted than the prompts themselves."""
        return self.max_tokens != 0

    @property
    def scores_prompts(self) -> bool:
        """Whether the prompts are scored: for their tokens' log-probabilities, or because nothing else is asked for."""
        return bool(self.echo) and (self.logprobs is not None or not self.writes)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def search(self) -> dict[str, Any]:
        """Our search options for this request; raises InputError for what cannot be honoured, by name."""
        self._refuse_unsupported()
        options: dict[str, Any] = {
            "num_beams": 1,
            "num_return_sequences": self.num_candidates if self.samples else 1,
            "max_new_tokens": 16 if self.max_tokens is None else self.max_tokens,
            "length_penalty": 1.0,  # a score is then the log-probability per token, by which best_of chooses
            "do_sample": self.samples,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs or 0,
        }
        if self.samples:
            options["temperature"] = 1.0 if self.temperature is None else max(self.temperature, LEAST_TEMPERATURE)
            options["top_p"] = 1.0 if self.top_p is None else self.top_p
            options["seed"] = None if self.seed is None else self.seed % 2**63
        if self.stop:
            options["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return {name: value for name, value in options.items() if value is not None}

    def _refuse_unsupported(self) -> None:
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise _unsupported(name, "leave it out")
        if self.best_of is not None and self.best_of < self.num_choices:
            message = f"best_of is {shown(self.best_of)}, less than n, which is {shown(self.num_choices)}"
            raise InputError(f"{message}; raise best_of, or leave it out", param="best_of", code="invalid_value")
        if self.stream and self.num_candidates > self.num_choices:
            raise _unsupported("best_of", "the best are known only at the end; leave stream out, or best_of")
        if not self.writes and not self.echo:
            message = "max_tokens is 0, which asks for the prompt alone; set echo to true, or allow at least 1 token"
            raise InputError(message, param="max_tokens", code="invalid_value")


def _unsupported(name: str, fix: str) -> InputError:
    return InputError(f"{name} is not supported at this value: {fix}", param=name, code="unsupported_value")


class CompletionLogprobs(Strict):
    """One entry for each token, those of an echoed prompt first; EOS is among them where a text ended by itself.

    `tokens` are spelt as the vocabulary spells them, so they need not join to the text. `text_offset` is where each one
    begins in the choice's text: of a prompt's token, where it was read; of another, after all characters that the
    tokens before it have completed, so that tokens which spell one character together begin where it does, and those
    that a stop string cut off begin at the end. In a stream it counts from the beginning of the whole text.
    `top_logprobs` holds the `logprobs` likeliest tokens and the chosen one; null where that is 0."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


class Choice(Strict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionUsage(Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(Strict):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str  # the revision of the model
    choices: list[Choice]
    usage: CompletionUsage | None = None


NOTHING: dict[str, Any] = {"text": "", "finish_reason": "length"}  # what was written where nothing was asked for


@dataclass(frozen=True)
class CompletionWriter:
    """Our answers to one request in OpenAI's words, all under one id.

    scores: of the prompts, where the request scores them. results: of what was written, where it writes. Both stand in
    the order of the prompts, and so do choices.
    """

    model: str
    revision: str
    request: CompletionRequest
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(
        self, scores: Ordered[dict[str, Any]], results: Ordered[dict[str, Any]], usage: dict[str, int]
    ) -> dict[str, Any]:
        choices = []
        for index, sequence in self._sequences(results):
            written = sequence if self.request.writes else None
            logprobs = self._logprobs(index, scores, written)
            choices.append(_choice(index, self._echoed(index) + sequence["text"], logprobs, sequence["finish_reason"]))
        return self._body(choices, usage)

    def echo(self, scores: Ordered[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice, where the prompt is to be echoed and is no empty text."""
        for index in range(len(self.request.prompts) * self.request.num_choices):
            if text := self._echoed(index):
                yield self._body([_choice(index, text, self._logprobs(index, scores, None))])

    def delta(self, prompt: int, sequence: int, text: str, told: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """More of a sequence, for each choice that it is the answer of. told: what is new of its tokens."""
        places = [sequence] if self.request.samples else range(self.request.num_choices)
        for index in (prompt * self.request.num_choices + place for place in places):
            yield self._body([_choice(index, text, self._logprobs(index, (), told))])

    def finish(self, results: Ordered[dict[str, Any]], usage: dict[str, int]) -> Iterator[dict[str, Any]]:
        """The last chunk of each choice: no more text, and why it ended. Then the usage, where it is wanted."""
        for index, sequence in self._sequences(results):
            yield self._body([_choice(index, "", None, sequence["finish_reason"])])
        if self.request.wants_usage:
            yield self._body([], usage)

    def _sequences(self, results: Ordered[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The index of each choice, and what was written for it."""
        found = [result["sequences"] for result in results] or [[NOTHING]] * len(self.request.prompts)
        return enumerate(sequence for sequences in found for sequence in self._chosen(sequences))

    def _chosen(self, sequences: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to one prompt: the one of a greedy search again and again, the best of many candidates, or all
        samples in their order."""
        count = self.request.num_choices
        if len(sequences) <= count:
            return sequences if len(sequences) == count else sequences[:1] * count
        return sorted(sequences, key=lambda sequence: sequence["score"], reverse=True)[:count]

    def _echoed(self, index: int) -> str:
        """The prompt of a choice, where it is to be echoed: as it was sent, whatever the tokenizer makes of it."""
        return self.request.prompts[index // self.request.num_choices] if self.request.echo else ""

    def _logprobs(
        self, index: int, scores: Ordered[dict[str, Any]], written: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Of the prompt of a choice, where there are scores, and of what was written after it."""
        if self.request.logprobs is None or not (scores or written):
            return None
        told: list[tuple[dict[str, Any], int]] = []
        if scores:
            score = scores[index // self.request.num_choices]
            # Whatever is scored ends with EOS, and a prompt does not.
            told.append(({name: score[name][:-1] for name in LISTS if name in score}, 0))
        if written:
            told.append((written, len(self._echoed(index))))
        return {
            "tokens": [token for each, _ in told for token in each["tokens"]],
            "token_logprobs": [logprob for each, _ in told for logprob in each["logprobs"]],
            "top_logprobs": [step for each, _ in told for step in _top(each)] if self.request.logprobs else None,
            "text_offset": [before + offset for each, before in told for offset in each["offsets"]],
        }

    def _body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.revision,
            "choices": choices,
        }
        if usage is not None:
            spoken, written = usage["input_tokens"], usage["output_tokens"]
            body["usage"] = {"prompt_tokens": spoken, "completion_tokens": written, "total_tokens": spoken + written}
        return body


LISTS = ("tokens", "logprobs", "top_logprobs", "offsets")  # of a score, an entry for each token


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
    reason = None if finish_reason is None else FINISH_REASONS[finish_reason]
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _top(told: dict[str, Any]) -> Iterator[dict[str, float]]:
    """For each token the likeliest ones, best first, and the token itself where it is none of them."""
    for likeliest, token, logprob in zip(told["top_logprobs"], told["tokens"], told["logprobs"], strict=True):
        yield {one["token"]: one["logprob"] for one in likeliest} | {token: logprob}
