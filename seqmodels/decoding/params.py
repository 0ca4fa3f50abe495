"""SearchParams: the options of one request, with the rule each one follows.

Names are Hugging Face's where it has the option, then OpenAI's (`stop`, `seed`, `logprobs`, `top_logprobs`); `prefix`,
`bad_words`, `force_words` and `coverage_penalty` are ours.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from seqmodels.config import Strict

NonNegativeInt = Annotated[int, Field(ge=0)]
LARGEST_POWER = 30  # of ten, that a score may be divided by: float32 ends at 38
TOP_LOGPROBS = 20  # the most that one may ask for, as with OpenAI
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=64)]


class SearchParams(Strict):
    """A hypothesis scores the sum of its log-probabilities divided by length ** length_penalty, EOS counted; then the
    coverage penalty is added, which is at most 0."""

    num_beams: PositiveInt = 1  # 1 is greedy, or sampling with do_sample
    num_return_sequences: PositiveInt = 1  # at most num_beams, unless do_sample
    max_new_tokens: PositiveInt = 64
    min_new_tokens: NonNegativeInt = 0  # no EOS before so many tokens
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool = True  # stop when num_beams hypotheses are finished; false: when none can get better
    do_sample: bool = False  # draw from the distribution left after the rules
    temperature: Annotated[float, Field(ge=0.001, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0  # keep the k best tokens; 0 keeps all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # keep the smallest set of tokens with this much probability
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # Keskar et al. 2019
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=100)] = 0  # no n-gram of this length twice; 0 allows all
    prefix: str = ""  # the answer begins with this text, which is not scored
    stop: Words = ()  # the text ends before the first of these
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # one is chosen, and named in the answer, where None
    logprobs: bool = False  # answer with each token's log-probability in nats
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] = 0  # and with so many likeliest tokens at each step
    output_attentions: bool = False  # answer with where the model looked for each token
    coverage_penalty: Annotated[float, Field(ge=0, le=100)] = (
        0.0  # beta of Wu et al. 2016, eq. 14: for what it left out
    )
    bad_words: Words = ()  # token sequences never written
    force_words: Words = ()  # words and phrases that the output holds, as whole words; needs num_beams > 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("temperature", "top_k", "top_p"):
            if not self.do_sample and getattr(self, name) != type(self).model_fields[name].default:
                raise contradiction((name, "do_sample"), f"{name} is {getattr(self, name)}, which needs do_sample=true")
        if self.do_sample and self.num_beams > 1:
            raise contradiction(
                ("num_beams", "do_sample"),
                f"num_beams is {self.num_beams} and do_sample is true: sampling uses no beams; choose one",
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise contradiction(
                ("num_return_sequences", "num_beams"),
                f"num_return_sequences is {self.num_return_sequences}, but num_beams={self.num_beams} finds at most "
                f"{self.num_beams}; raise num_beams or set do_sample=true",
            )
        if self.stop and self.num_beams > 1:
            raise contradiction(
                ("stop", "num_beams"), "stop needs num_beams=1: with beams the text is not known until the end"
            )
        if self.force_words and self.num_beams == 1:
            raise contradiction(
                ("force_words", "num_beams"), "force_words needs num_beams > 1: greedy search cannot make room for them"
            )
        if self.coverage_penalty and self.num_beams == 1:
            raise contradiction(
                ("coverage_penalty", "num_beams"),
                "coverage_penalty needs num_beams > 1: it ranks finished hypotheses, and without beams there is one",
            )
        if abs(self.length_penalty) * math.log10(self.max_new_tokens) > LARGEST_POWER:
            raise contradiction(
                ("length_penalty", "max_new_tokens"),
                f"length_penalty is {self.length_penalty} and max_new_tokens {self.max_new_tokens}: a score would be "
                f"divided by more than 1e{LARGEST_POWER}; lower one of them",
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise contradiction(
                ("min_new_tokens", "max_new_tokens"),
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, which is {self.max_new_tokens}",
            )
        return self

    @property
    def width(self) -> int:
        """Decoder rows that the request fills: its beams, or its samples."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    @classmethod
    def over(cls, defaults: "SearchParams", given: Mapping[str, Any]) -> Self:
        """Given options over defaults. A default gives way to what it contradicts; given options do not.

        Raises pydantic's ValidationError.
        """
        fields = defaults.model_dump(exclude_defaults=True)
        while True:
            try:
                return cls.model_validate_json(json.dumps({**fields, **given}))
            except ValidationError as error:
                contradicting = error.errors(include_url=False)[0].get("ctx", {}).get("fields", ())
                giving_way = [name for name in contradicting if name in fields and name not in given]
                if not giving_way:
                    raise
                del fields[giving_way[0]]


def contradiction(fields: tuple[str, ...], message: str) -> PydanticCustomError:
    """Options that cannot stand together; the first of them is the one at fault."""
    return PydanticCustomError("contradiction", "{message}", {"fields": fields, "message": message})
