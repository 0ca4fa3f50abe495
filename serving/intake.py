"""From a parsed request body to jobs for a pipeline: limits, base64, tokenizing.

Pure functions, slow enough (pictures, long texts) that they run in pool threads, never on the event loop. The first
bad item fails its whole list and is named, as in `inputs[3]`.
"""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seqmodels.clips import extent
from seqmodels.errors import InputError, TooLongError
from serving.completions import CompletionRequest
from serving.config import Limits
from serving.errors import EMPTY, shown
from serving.models import ServedModel
from serving.schema import (
    CaptionRequest,
    ClassifyRequest,
    FeaturesInput,
    FramesInput,
    GenerateRequest,
    GeneratorOptions,
    ImageInput,
    LabelsRequest,
    RawCaptionRequest,
    ScoreRequest,
    TagRequest,
    TextInput,
    TranslateRequest,
    WordsInput,
)
from serving.service import Work
from serving.states import Opened, Seal

if TYPE_CHECKING:
    from seqmodels.pipeline import Pipeline

TaskRequest = ClassifyRequest | TagRequest | TranslateRequest | CaptionRequest | RawCaptionRequest | GenerateRequest
Input = str | bytes | TextInput | WordsInput | ImageInput | FramesInput | FeaturesInput
PipelineItem = str | dict[str, Any] | None


@dataclass(frozen=True)
class Terms:
    """Under which a request is taken in: what this server allows, until when it is of use (`time.monotonic` seconds),
    how urgent it is, whose it is, and what opens the states that he holds."""

    limits: Limits
    seal: Seal
    deadline: float
    priority: int = 0
    client: str = ""

    @property
    def turn(self) -> dict[str, Any]:
        """What decides when it has its turn, for `Pipeline.prepare`."""
        return {"deadline": self.deadline, "priority": self.priority, "client": self.client}


def prepare_inputs(model: ServedModel, body: TaskRequest, terms: Terms) -> Work:
    """A job for each of `inputs`, which is one or a list. Raises InputError."""
    pipeline, limits = model.pipeline, terms.limits
    options = body.search() if isinstance(body, GeneratorOptions) else {}
    check_search(options, limits)
    if isinstance(body, GeneratorOptions) and pipeline.max_new_tokens > limits.max_new_tokens:
        options.setdefault("max_new_tokens", limits.max_new_tokens)  # what the model does by itself is bounded too
    stream = isinstance(body, GeneratorOptions) and body.stream
    items = named_items(body.inputs, "inputs", limits)
    states = open_states(body.state, len(items), terms)
    jobs = []
    for (item, field), opened in zip(items, states, strict=True):
        with _state_named(opened):
            job = pipeline.prepare(
                item,
                options,
                field=field,
                truncate=body.truncate,
                stream=stream,
                state=opened.state if opened else None,
                return_state=body.return_state,
                threshold=body.threshold if isinstance(body, LabelsRequest) else None,
                **terms.turn,
            )
        jobs.append(job)
    params = getattr(jobs[0].request, "params", None)  # with the model's own
    names = [name for name in ("output_attentions", "top_logprobs") if getattr(params, name, None)]
    name = names[0] if names else "return_state"
    fix = "send fewer inputs" if name == "return_state" else "lower max_new_tokens, or send fewer inputs"
    _check_details(sum(map(pipeline.num_details, jobs)), limits, name, fix)
    exact = {
        job.id: opened.from_here and pipeline.goes_on_exactly(job, opened.width)
        for job, opened in zip(jobs, states, strict=True)
        if opened
    }
    return Work(model, jobs, terms.deadline, exact)


def open_states(states: str | list[str] | None, count: int, terms: Terms) -> list[Opened | None]:
    """What each of `count` inputs goes on from. Raises InputError."""
    if states is None:
        return [None] * count
    named = [(states, "state")] if isinstance(states, str) else [(one, f"state[{i}]") for i, one in enumerate(states)]
    if len(named) != count:
        message = f"state holds {len(named)} states for {count} inputs; give one state for each input"
        raise InputError(message, param="state")
    return [terms.seal.open(state, field) for state, field in named]


@contextmanager
def _state_named(opened: Opened | None) -> Iterator[None]:
    """A pipeline, which is asked for one input at a time, says `state` of one of several."""
    try:
        yield
    except InputError as error:
        if opened is None or error.param != "state":
            raise
        message = opened.field + str(error).removeprefix("state")
        raise InputError(message, param=opened.field, code=error.code) from None


def prepare_score(model: ServedModel, body: ScoreRequest, terms: Terms) -> Work:
    """One job for each pair of input and target. Raises InputError."""
    limits = terms.limits
    targets = named_items(body.targets, "targets", limits)
    inputs = (
        named_items(body.inputs, "inputs", limits) if body.inputs is not None else [(None, "inputs")] * len(targets)
    )
    if len(inputs) != len(targets):
        message = f"targets holds {len(targets)} texts for {len(inputs)} inputs; give one target for each input"
        raise InputError(message, param="targets", code="invalid_value")
    jobs = [
        model.pipeline.prepare_score(
            item, str(target), field=field, target_field=target_field, truncate=body.truncate, **terms.turn
        )
        for (item, field), (target, target_field) in zip(inputs, targets, strict=True)
    ]
    return Work(model, jobs, terms.deadline)


def prepare_completion(model: ServedModel, body: CompletionRequest, terms: Terms) -> Work:
    """Of an OpenAI completion: a job that scores each prompt, where they are to be scored, then one that goes on from
    each, where something is to be written. Raises InputError."""
    pipeline, limits = model.pipeline, terms.limits
    options = body.search()
    if body.max_tokens is None or "max_tokens" not in body.model_fields_set:  # OpenAI's default, where it is allowed
        options["max_new_tokens"] = min(options["max_new_tokens"], limits.max_new_tokens)
    names = {"num_return_sequences": "best_of" if body.best_of else "n", "max_new_tokens": "max_tokens"}
    check_search({**options, "num_return_sequences": body.num_candidates}, limits, names)
    items = named_items(body.prompt, "prompt", limits)
    if body.echo:
        _check_echo(pipeline, body, limits)
    _check_size((body.scores_prompts + body.writes) * len(items), limits.inputs, "items to score and answer", "prompt")
    scoring = [
        pipeline.prepare_score(None, text, target_field=field, top_logprobs=body.logprobs or 0, **terms.turn)
        for text, (_, field) in zip(body.prompts if body.scores_prompts else [], items, strict=False)
    ]
    writing = [
        pipeline.prepare(item, options, field=field, stream=bool(body.stream), **terms.turn)
        for item, field in (items if body.writes else [])
    ]
    if body.logprobs is not None:  # what is told of a prompt, and of a greedy answer, is told in each choice
        told = body.num_choices * sum(2 * job.num_input_tokens + pipeline.num_details(job) for job in scoring)
        told += (1 if body.samples else body.num_choices) * sum(map(pipeline.num_details, writing))
        _check_details(told, limits, "logprobs", "lower max_tokens or n, or send fewer prompts")
    return Work(model, scoring + writing, terms.deadline)


def named_items(inputs: Any, field: str, limits: Limits) -> list[tuple[PipelineItem, str]]:
    """Each item as a pipeline takes it, and its name for error messages. Raises InputError."""
    if not isinstance(inputs, list):
        return _drawable([(pipeline_item(inputs, field, limits), field)], field, limits)
    if not inputs:
        raise InputError(f"{field} is an empty list; give at least one item", param=field, code=EMPTY)
    _check_size(len(inputs), limits.inputs, "items", field)
    names = [f"{field}[{index}]" for index in range(len(inputs))]
    items = [(pipeline_item(item, name, limits), name) for item, name in zip(inputs, names, strict=True)]
    return _drawable(items, field, limits)


def _drawable(items: list[tuple[PipelineItem, str]], field: str, limits: Limits) -> list[tuple[PipelineItem, str]]:
    """The same, unless drawing all their pictures would take too long: 34 bytes of WebP can be 7 million pixels. One
    picture alone is for its model to refuse."""
    if len(items) == 1 and isinstance(items[0][0], dict) and "image" in items[0][0]:
        return items
    pixels = 0
    for item, name in items:
        for more in _num_pixels(item, name, limits):
            pixels += more
            _check_size(pixels, limits.pixels, "pixels or more", field)
    return items


def _num_pixels(item: PipelineItem, field: str, limits: Limits) -> Iterator[int]:
    """Of each file; of an animated one, all its frames together. Raises InputError where there are too many."""
    match item:
        case {"image": bytes(picture)}:
            yield extent(picture)[1]
        case {"frames": bytes(clip)}:
            frames, pixels = extent(clip)
            _check_size(frames, limits.frames, "frames", f"{field}.frames")
            yield frames * pixels
        case {"frames": [*pictures]}:
            yield from (extent(picture)[1] for picture in pictures)


def pipeline_item(item: Input | None, field: str, limits: Limits) -> PipelineItem:
    """Check one input against the limits and decode its base64. Raises InputError."""
    match item:
        case None:
            return None
        case str():
            _check_size(len(item), limits.characters, "characters", field)
            return item
        case bytes():
            _check_size(len(item), limits.image_bytes, "bytes", field)
            return {"image": item}
        case TextInput():
            _check_size(len(item.text), limits.characters, "characters", f"{field}.text")
            return {"text": item.text}
        case WordsInput():
            _check_size(len(item.words), limits.words, "words", f"{field}.words")
            _check_size(sum(map(len, item.words)), limits.characters, "characters", f"{field}.words")
            return {"words": item.words}
        case ImageInput():
            return {"image": _decode(item.image, f"{field}.image", limits)}
        case FramesInput(frames=str(file)):
            return {"frames": _decode(file, f"{field}.frames", limits)}
        case FramesInput():
            _check_size(len(item.frames), limits.frames, "frames", f"{field}.frames")
            return {"frames": [_decode(f, f"{field}.frames[{i}]", limits) for i, f in enumerate(item.frames)]}
        case FeaturesInput():
            _check_size(sum(map(len, item.features)), limits.features, "numbers", f"{field}.features")
            _check_size(len(item.features), limits.features, "steps", f"{field}.features")
            return {"features": item.features}


def check_search(options: dict[str, Any], limits: Limits, names: dict[str, str] | None = None) -> None:
    """Raise InputError for an option above this server's limit. names: what the client calls an option."""
    for option in ("num_beams", "num_return_sequences", "max_new_tokens", "min_new_tokens"):
        most = limits.max_new_tokens if option == "min_new_tokens" else getattr(limits, option)
        value = options.get(option, 0)
        if value > most:
            name = (names or {}).get(option, option)
            message = f"{name} is {shown(value)}, but this server allows at most {most}"
            raise InputError(message, param=name, code="limit_exceeded")
    for option in ("stop", "bad_words", "force_words"):
        strings = options.get(option, ())
        _check_size(len(strings), limits.stop, "strings", option)
        _check_size(max(map(len, strings), default=0), limits.stop_characters, "characters in one string", option)
    _check_size(len(options.get("prefix", "")), limits.characters, "characters", "prefix")


def _check_echo(pipeline: "Pipeline", body: CompletionRequest, limits: Limits) -> None:
    if pipeline.config.input != "nothing":
        message = "echo is true, but this model answers an input and does not go on from it; leave echo out"
        raise InputError(message, param="echo", code="unsupported_value")
    characters = body.num_choices * sum(map(len, body.prompts))
    _check_size(characters, limits.body_bytes, "characters of prompts in all answers", "echo")


def _check_details(details: int, limits: Limits, name: str, fix: str) -> None:
    if details > limits.details:
        message = f"{name} asks for up to {details} numbers, but this server allows at most {limits.details}"
        raise InputError(f"{message}; {fix}", param=name, code="limit_exceeded")


def _decode(text: str, field: str, limits: Limits) -> bytes:
    _check_size(len(text) * 3 // 4, limits.image_bytes, "bytes", field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        message = f"{field} is not base64; send the bytes of an image file in base64, without a data: prefix"
        raise InputError(message, param=field, code="invalid_base64") from None


def _check_size(size: int, most: int, unit: str, field: str) -> None:
    if size > most:
        message = f"{field} has {size} {unit}, but this server allows at most {most}; send less"
        raise TooLongError(message, param=field)
