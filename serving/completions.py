"""The OpenAI completions protocol: its request, its answers, and the one mapping onto our search options.

Known fields that we cannot honour are accepted at their neutral value and refused by name at any other; unknown
fields are ignored, on this route alone, because clients of that protocol send many.
"""

import time
import uuid
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from seqmodels.config import Strict
from seqmodels.errors import InputError
from serving.schema import OneOrMany

# What each field must be, where being anything else would change an answer in a way that we do not offer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "echo": (None, False),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
FINISH_REASONS = {"eos": "stop", "stop": "stop", "constraint": "stop", "length": "length"}


class StreamOptions(Strict):
    include_usage: bool = False
    model_config = ConfigDict(extra="ignore")


class CompletionRequest(Strict):
    """A request for completions, with OpenAI's defaults. `logprobs` may be 0: those of the chosen tokens."""

    model: str | None = None
    prompt: OneOrMany | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    best_of: Annotated[int, Field(ge=1)] | None = None
    stop: OneOrMany | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    echo: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"example": {"prompt": "Once upon a", "max_tokens": 32, "temperature": 0.8, "seed": 7}},
    )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def search(self) -> dict[str, Any]:
        """Our search options for this request; raises InputError for what cannot be honoured, by name."""
        self._refuse_unsupported()
        samples = self.temperature is None or self.temperature > 0
        options: dict[str, Any] = {
            "num_beams": 1,
            "num_return_sequences": self.n or 1,
            "max_new_tokens": self.max_tokens or 16,
            "do_sample": samples,
            "logprobs": self.logprobs is not None,
        }
        if samples:
            options["temperature"] = 1.0 if self.temperature is None else self.temperature
            options["top_p"] = 1.0 if self.top_p is None else self.top_p
            options["seed"] = self.seed
        if self.stop:
            options["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return {name: value for name, value in options.items() if value is not None}

    def _refuse_unsupported(self) -> None:
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise _unsupported(name, "leave it out")
        if self.best_of not in (None, self.n or 1):
            raise _unsupported("best_of", "leave it out, or use num_beams on the task's own endpoint")
        if self.logprobs:
            raise _unsupported("logprobs", "use 0, which gives the log-probability of each chosen token")
        if self.logprobs is not None and self.stream:
            raise _unsupported("logprobs", "it is not given in a stream; ask without stream")
        if self.temperature == 0 and (self.n or 1) > 1:
            raise _unsupported("n", "with temperature 0 all answers are the same; ask for one")


def _unsupported(name: str, fix: str) -> InputError:
    return InputError(f"{name} is not supported at this value: {fix}", param=name, code="unsupported_value")


class CompletionLogprobs(Strict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: None = None


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


@dataclass(frozen=True)
class CompletionWriter:
    """Our answers in OpenAI's words, all under one id. width: how many choices each prompt has."""

    model: str
    revision: str
    width: int
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, results: Ordered[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self._choice(index, sequence, sequence["text"]) for index, sequence in self._sequences(results)]
        return self._body(choices, usage)

    def delta(self, prompt: int, sequence: int, text: str) -> dict[str, Any]:
        return self._body([{"index": prompt * self.width + sequence, "text": text, **UNFINISHED}])

    def finish(self, results: Ordered[dict[str, Any]]) -> dict[str, Any]:
        """The last chunk: no more text, and why each choice ended."""
        return self._body([self._choice(index, sequence, "") for index, sequence in self._sequences(results)])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._body([], usage)

    def _sequences(self, results: Ordered[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        return [
            (prompt * self.width + place, sequence)
            for prompt, result in enumerate(results)
            for place, sequence in enumerate(result["sequences"])
        ]

    def _choice(self, index: int, sequence: dict[str, Any], text: str) -> dict[str, Any]:
        logprobs = None
        if "logprobs" in sequence:
            logprobs = {
                "tokens": sequence["tokens"],
                "token_logprobs": sequence["logprobs"],
                "top_logprobs": None,
                "text_offset": None,
            }
        reason = FINISH_REASONS[sequence["finish_reason"]]
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

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


UNFINISHED: dict[str, Any] = {"logprobs": None, "finish_reason": None}
