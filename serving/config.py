"""ServeConfig: what the service runs and what it allows, as data. Strict, frozen, from YAML or a command line.

Knows no HTTP, no Ray and no torch. Every field has its default here and nowhere else.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from seqmodels.config import Strict, Weights, explain
from seqmodels.errors import ConfigError
from seqmodels.yaml_files import read_yaml

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _checked_revision(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError("YAML takes this revision for a number; write it in quotes")
    return value


def _checked_name(name: str) -> str:
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-' (at most 100)")
    return name


class Limits(Strict):
    """The most that one request may ask for. Passing any of them is a 4xx that names the limit."""

    body_bytes: PositiveInt = 8 * 2**20  # enforced while reading, before anything is parsed
    inputs: PositiveInt = 256  # items in one request
    characters: PositiveInt = 20_000  # in one text, one target, or all words of one item together
    words: PositiveInt = 2_000  # in one pre-split item
    image_bytes: PositiveInt = 4 * 2**20  # of one picture or frame, after base64
    frames: PositiveInt = 64
    # Of all pictures in one request together, which take about a second to draw: few bytes can ask for very many.
    pixels: PositiveInt = 64_000_000
    features: PositiveInt = 1_000_000  # numbers in one item: steps times feature size
    num_beams: PositiveInt = 16
    num_return_sequences: PositiveInt = 16  # n and best_of of completions likewise
    max_new_tokens: PositiveInt = 512
    # numbers of top_logprobs, attentions and states in one answer, were it as long as allowed
    details: PositiveInt = 500_000
    stop: PositiveInt = 8  # stop strings, and as many bad_words and force_words
    stop_characters: PositiveInt = 100  # in one stop string, bad or forced word
    batches: PositiveInt = 4  # requests to /v1/batch at a time, in each replica
    batch_window: PositiveInt = 64  # lines of a batch at work at a time
    batch_bytes: PositiveInt = 64 * 2**20  # of its lines that wait; then it is read no further
    batch_s: PositiveFloat = 3600.0  # from its first line to its last answer
    timeout_s: PositiveFloat = 60.0  # from arrival to answer; a client may ask for less, never for more

    @property
    def longest_s(self) -> float:
        """That anything takes here: of a batch, unless that is bounded to less than a request."""
        return max(self.timeout_s, self.batch_s)


class Autoscaling(Strict):
    """How many replicas Ray Serve keeps, by the decoder rows that are in use or asked for."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    target_occupancy: PositiveFloat = 0.7  # of the rows of the fullest model in a replica
    # How long more replicas, or fewer, must have been needed; by the mean of the last half minute.
    upscale_delay_s: NonNegativeFloat = 30.0
    downscale_delay_s: NonNegativeFloat = 600.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, which is {self.max_replicas}")
        return self


Name = Annotated[str, AfterValidator(_checked_name)]
Revision = Annotated[str, BeforeValidator(_checked_revision)]


class Parsed(Strict):
    """Base of what is built from a file's plain data."""

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Build from plain data; raises ConfigError that names the field, its value and what is allowed."""
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"a value is not plain data: {error}") from None


class Tracing(Strict):
    """Where spans of requests go, by OpenTelemetry."""

    # MODULE:NAME of what makes an exporter, called without arguments: OTLP's reads OTEL_EXPORTER_OTLP_ENDPOINT and its
    # like from the environment, and is installed with the extra `trace`.
    exporter: str = "opentelemetry.exporter.otlp.proto.http.trace_exporter:OTLPSpanExporter"
    # Of the requests whose clients name no trace. Where one does, in the header traceparent, it has decided.
    sampling_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class ModelSet(Parsed):
    """The part of a service that may change while it runs: Ray Serve's `user_config`, which reaches every replica."""

    # Name that clients use -> model directory, or a list of those whose models answer as one.
    models: dict[Name, str | Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    aliases: dict[Name, str] = Field(default={})  # another name that clients may use -> a name in models
    # Name -> the revision that the directory must hold, so that all replicas serve the same. Where it is left out any
    # is taken; a change loads the directory again.
    revisions: dict[str, Revision] = Field(default={})

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        for alias, name in self.aliases.items():
            if alias in self.models:
                raise ValueError(f"aliases has {alias!r}, which is also a name in models; rename one of them")
            if name not in self.models:
                raise ValueError(f"aliases.{alias} is {name!r}, which is no name in models: {', '.join(self.models)}")
        for name in self.revisions:
            if name not in self.models:
                raise ValueError(f"revisions has {name!r}, which is no name in models: {', '.join(self.models)}")
        return self

    @property
    def directories(self) -> dict[str, list[str]]:
        """Of each model: one, or those of an ensemble's members."""
        return {name: [given] if isinstance(given, str) else given for name, given in self.models.items()}


Port = Annotated[int, Field(ge=1, le=65535)]

# Fields of ServeConfig alone, and how a cluster is told the same.
ELSEWHERE = {
    "host": "under http_options, and allowed_hosts says by which names clients may call",
    "port": "under http_options",
    "profile": "by the environment of the nodes (see docs/serving.md)",
    "metrics_port": "by `ray start --metrics-export-port`",
}


class Settings(Parsed):
    """The rest: what a service may use and what it allows, from its start to its end. In a Serve configuration, its
    `args`."""

    # Names by which clients may call this service, as `example.org` or `*.example.org`, so that no page of another site
    # can reach it under a name of its own. Left out: any; but where `python -m serving` listens on loopback, the names
    # of this machine.
    allowed_hosts: list[str] | None = None
    cors_origins: list[str] = Field(default=[])  # sites whose pages may call it, such as https://example.org
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPU when there is one, CPU otherwise
    num_threads: PositiveInt = 1  # torch threads, and CPUs reserved, in each replica
    # Of generators: int8 is faster on a CPU, float16 and bfloat16 on a GPU, at a small loss.
    decoder_weights: Weights = "float32"
    # Translators that have one use it: faster, at a small loss (python -m training shortlist). Its own logits are
    # computed in float32 whatever decoder_weights is.
    shortlist: bool = False
    max_rows: PositiveInt = 256  # decoder rows of one model that live at once
    # States of each language model kept by the prompts that led to them, so that prompts that begin alike are read
    # once. An answer then comes sooner where another client's prompt began like it; 0 keeps none.
    prefix_cache_states: Annotated[int, Field(ge=0, le=2**20)] = 1024
    max_requests: PositiveInt = 1024  # inputs accepted and not yet answered, in each replica; more get 429
    # One key per line, best as `python -m serving key` prints it; without a file SEQMODELS_API_KEYS is read, where
    # commas stand between keys.
    api_keys_file: str | None = None
    # Signs the states that clients hold: any 32 characters or more. Left out, one is made when the service is deployed,
    # and states do not outlive it.
    state_key_file: str | None = None
    state_lifetime_s: Annotated[float, Field(gt=0.0, le=1e10)] = 86_400.0  # after which a state is no longer taken back
    # What each key may send, over all replicas: each allows its share of it, ceil(requests_per_minute / replicas), of
    # autoscaling / max_replicas, however few there are.
    requests_per_minute: PositiveInt | None = None
    replicas: PositiveInt = 1
    num_gpus: Annotated[float, Field(ge=0.0)] | None = None  # for each replica; left out: 1 on "cuda", 0 on "cpu"
    autoscaling: Autoscaling | None = None  # in place of a fixed number of replicas
    # A stream's first piece goes out at once; what comes within so many seconds after a piece goes out together.
    stream_interval_s: Annotated[float, Field(ge=0.0)] = 0.05
    access_log: bool = True  # a line for each request in Ray Serve's log files; never with its text
    tracing: Tracing | None = None  # `{}` for all defaults; left out, no trace is kept
    stall_after_s: PositiveFloat = 30.0  # an engine that does not turn for so long counts as dead
    # The time that running requests get to finish when a replica goes. Ray adds ten seconds; what takes longer, such as
    # a long stream, is then cut off.
    drain_s: PositiveFloat = 20.0
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _check_place(cls, fields: Any) -> Any:
        for name in ELSEWHERE if isinstance(fields, dict) else ():
            if name in fields and name not in cls.model_fields:
                raise ValueError(
                    f"{name} is for `python -m serving` alone; remove it here: a cluster is told {ELSEWHERE[name]}"
                )
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.limits.inputs > self.max_requests:
            raise ValueError(
                f"limits.inputs is {self.limits.inputs}, but max_requests is {self.max_requests}, so such a list "
                "could never be accepted; raise max_requests or lower limits.inputs"
            )
        if self.limits.num_beams > self.max_rows or self.limits.num_return_sequences > self.max_rows:
            raise ValueError(
                f"max_rows is {self.max_rows}, fewer than limits.num_beams ({self.limits.num_beams}) or "
                f"limits.num_return_sequences ({self.limits.num_return_sequences}); raise it or lower them"
            )
        if self.autoscaling is not None and self.replicas != 1:
            raise ValueError(f"replicas is {self.replicas} and autoscaling is given; leave one of them out")
        if self.device == "cpu" and self.num_gpus:
            raise ValueError(f"num_gpus is {self.num_gpus}, but device is 'cpu'; leave one of them out")
        return self

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas


class ServeConfig(ModelSet, Settings):
    """One service, whole, as `python -m serving` begins it on this machine."""

    host: str = "127.0.0.1"  # loopback unless told otherwise
    port: Port = 8000
    # What stands before the replicas: Ray's own proxy, or HAProxy, which is faster and leaves clients that fall silent.
    profile: Literal["plain", "haproxy"] = "plain"
    # Of Ray's exporter, for Prometheus, on all of the machine's addresses. Left out: one that is free.
    metrics_port: Port | None = None

    @property
    def model_set(self) -> ModelSet:
        return ModelSet.model_validate(self.model_dump(include=set(ModelSet.model_fields)))

    @property
    def settings(self) -> Settings:
        fields = self.model_dump(include=set(Settings.model_fields))
        if self.allowed_hosts is None and self.is_loopback:
            fields["allowed_hosts"] = list(LOOPBACK)
        return Settings.model_validate(fields)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Self:
        """Read a YAML file; `overrides` replace its top-level fields. Its directories are taken from where the program
        was started, and become absolute, for replicas work elsewhere. Raises ConfigError that names the file."""
        fields = read_yaml(path, "the service's file")
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} holds no fields; it needs at least `models`, as deploy/service.yaml has")
        try:
            config = cls.parse({**fields, **overrides})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        absolute = {name: [str(Path(one).resolve()) for one in given] for name, given in config.directories.items()}
        return config.model_copy(update={"models": absolute})


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """`DIRECTORY` or `NAME=DIRECTORY` from a command line to name -> directory; a name defaults to the last part.

    Raises ConfigError if a directory is absent or a name is given twice.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        given, separator, rest = argument.partition("=")
        directory = Path(rest if separator else given)
        name = given if separator else directory.resolve().name
        if not directory.is_dir() or (separator and not rest):
            raise ConfigError(f"{argument} is not a directory; give a saved model, such as models/sentiment")
        if name in models:
            raise ConfigError(f"two models are called {name!r}; give one another name: NAME={directory}")
        models[name] = str(directory.resolve())
    return models
