"""What goes over the wire: requests and responses, with the examples that /docs shows.

Shapes only: how large a list or a number may be is in `config.Limits`, what a model takes is the pipeline's to say.
Lists fail at their first bad item, so that a body of a million faults costs no more than one.
"""

from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_origin

from pydantic import ConfigDict, Discriminator, FailFast, Field, Tag, create_model
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from seqmodels.config import Strict
from seqmodels.decoding.params import SearchParams
from serving.errors import INVALID_INPUT

Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
T = TypeVar("T")


class _FirstFault(FailFast):
    __hash__ = object.__hash__  # a member of a union needs one


Many = Annotated[list[T], _FirstFault()]


def _kind(value: Any) -> str | None:
    """Which shape an input claims to have. The ~ keeps these names out of error messages (see errors._field)."""
    if isinstance(value, str):
        return "~string"
    if isinstance(value, list):
        return "~list"
    if isinstance(value, dict) and len(value) == 1:
        return f"~{next(iter(value))}"
    return None


def _one_of(expected: str) -> Discriminator:
    return Discriminator(_kind, custom_error_type=INVALID_INPUT, custom_error_message=f"is neither {expected}")


Frames: TypeAlias = Annotated[
    Annotated[Base64, Tag("~string")] | Annotated[Many[Base64], Tag("~list")],
    _one_of("a string in base64 nor a list of these"),
]


class TextInput(Strict):
    text: str


class WordsInput(Strict):
    """Text already split into words."""

    words: Many[str]


class ImageInput(Strict):
    """A JPEG, PNG, GIF, WebP or BMP file in base64."""

    image: Base64


class FramesInput(Strict):
    """The frames of a clip in order, each a JPEG, PNG, GIF, WebP or BMP file in base64; or one animated file (GIF, WebP
    or PNG) in base64, of which each frame is taken as it is displayed."""

    frames: Frames


class FeaturesInput(Strict):
    """A numeric series: for each time step the same number of values."""

    features: Many[Many[float]]


ITEM = "a string nor an object with exactly one of text, words, image, frames, features"
Item: TypeAlias = Annotated[
    Annotated[str, Tag("~string")]
    | Annotated[TextInput, Tag("~text")]
    | Annotated[WordsInput, Tag("~words")]
    | Annotated[ImageInput, Tag("~image")]
    | Annotated[FramesInput, Tag("~frames")]
    | Annotated[FeaturesInput, Tag("~features")],
    _one_of(ITEM),
]
Items: TypeAlias = Annotated[
    Annotated[str, Tag("~string")]
    | Annotated[TextInput, Tag("~text")]
    | Annotated[WordsInput, Tag("~words")]
    | Annotated[ImageInput, Tag("~image")]
    | Annotated[FramesInput, Tag("~frames")]
    | Annotated[FeaturesInput, Tag("~features")]
    | Annotated[Many[Item], Tag("~list")],
    _one_of(f"{ITEM}, nor a list of these"),
]
OneOrMany: TypeAlias = Annotated[
    Annotated[str, Tag("~string")] | Annotated[Many[str], Tag("~list")],
    _one_of("a string nor a list of strings"),
]


class Request(Strict):
    """What every request may say."""

    model: str | None = None  # may be left out where one model serves the task
    truncate: bool = False  # cut an input longer than the model takes, where without it the answer is 413


class Resumable(Request):
    """A request whose answer others may go on from. `state`: from an earlier answer, one for each input."""

    state: OneOrMany | None = None
    return_state: bool = False


class LabelsRequest(Resumable):
    """threshold: a probability below which a label, or that of a tag, is null; where several labels may be right, those
    below it are left out."""

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None


class ClassifyRequest(LabelsRequest):
    inputs: Items
    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": ["a warm and funny film", "not worth the time"]}}
    )


class TagRequest(LabelsRequest):
    inputs: Items
    model_config = ConfigDict(json_schema_extra={"example": {"inputs": {"words": ["Ada", "lives", "in", "Oslo"]}}})


def _option(about: FieldInfo) -> Any:
    """A field of SearchParams as a request has it: with its bounds, and None for what is left out."""
    kind: Any = about.annotation
    own = Field(fail_fast=True) if get_origin(kind) is tuple else Field()
    return Annotated[kind, *about.metadata, own] | None, None


Search: Any = create_model(
    "Search", __base__=Strict, **{name: _option(about) for name, about in SearchParams.model_fields.items()}
)


# Options that are lists, which a query string holds as the same name several times.
LISTS = tuple(name for name, field in SearchParams.model_fields.items() if isinstance(field.default, tuple))


class GeneratorOptions(Resumable, Search):  # type: ignore[misc]  # a class made of data
    """What a request for text may say beside its inputs: how it is searched for, where null is the model's default."""

    stream: bool = False  # answer as server-sent events

    def search(self) -> dict[str, Any]:
        """The options that were given, for `Pipeline.prepare`."""
        return self.model_dump(include=set(SearchParams.model_fields), exclude_none=True)


class TranslateRequest(GeneratorOptions):
    inputs: Items
    model_config = ConfigDict(json_schema_extra={"example": {"inputs": ["A dog runs."], "num_beams": 5}})


class CaptionRequest(GeneratorOptions):
    inputs: Items
    model_config = ConfigDict(json_schema_extra={"example": {"inputs": {"image": "iVBORw0KGgo..."}, "num_beams": 3}})


class RawCaptionRequest(GeneratorOptions):
    """A picture that was the whole body, with the options of the query string."""

    inputs: bytes


class GenerateRequest(GeneratorOptions):
    """`inputs` are texts to go on from; without them the model writes freely."""

    inputs: Items | None = None
    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": "Once upon a", "do_sample": True, "temperature": 0.8, "seed": 7}}
    )


class ScoreRequest(Request):
    """How likely each target is, given its input. For a language model `inputs` is left out."""

    targets: OneOrMany
    inputs: Items | None = None
    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": ["A dog runs."], "targets": ["Ein Hund rennt."]}}
    )


class Usage(Strict):
    input_tokens: int
    output_tokens: int


class Response(Strict):
    model: str
    revision: str
    usage: Usage


def _example(result: JsonDict, input_tokens: int, output_tokens: int) -> ConfigDict:
    usage: JsonDict = {"input_tokens": input_tokens, "output_tokens": output_tokens}
    answer: JsonDict = {"model": "my-model", "revision": "1f3a8c02d417", "usage": usage, "results": [result]}
    return ConfigDict(json_schema_extra={"example": answer})


class Resumed(Strict):
    """state: of return_state, to be sent with the next request. state_exact: where one was sent, whether the answer is
    to the last bit what one uninterrupted request would have got, as it is on a processor and settings like those that
    the state was made with."""

    state: str | None = None
    state_exact: bool | None = None


class Classification(Resumed):
    """label: null where its score is below the threshold that was asked for."""

    label: str | None
    score: float
    scores: dict[str, float]


class MultiLabelClassification(Resumed):
    """The labels that are likelier than not, or as likely as the threshold that was asked for."""

    labels: list[str]
    scores: dict[str, float]


class Regression(Resumed):
    values: dict[str, float]


class ClassifyResponse(Response):
    results: list[Classification] | list[MultiLabelClassification] | list[Regression]
    model_config = _example({"label": "good", "score": 0.93, "scores": {"good": 0.93, "bad": 0.07}}, 5, 1)


class Span(Strict):
    """One labelled span; start and end count characters (or words, frames or steps) of the input. label: null where its
    score is below the threshold that was asked for."""

    label: str | None
    score: float
    start: int
    end: int
    text: str | None = None


class Tagging(Resumed):
    tags: list[Span]


class TagResponse(Response):
    results: list[Tagging]
    model_config = _example({"tags": [{"label": "PER", "score": 0.98, "start": 0, "end": 3, "text": "Ada"}]}, 4, 4)


class TopLogprob(Strict):
    token: str
    logprob: float


class Sequence(Strict):
    """What was asked for of each generated token stands in lists as long as `tokens`."""

    text: str
    score: float
    finish_reason: Literal["eos", "stop", "length", "constraint"]
    tokens: list[str] | None = None
    offsets: list[int] | None = None  # how many characters of the text the tokens before each one have completed
    logprobs: list[float] | None = None
    top_logprobs: list[list[TopLogprob]] | None = None  # the likeliest tokens at each step, best first
    attentions: list[list[float]] | None = None  # of output_attentions: weights over the input's positions
    state: str | None = None  # of return_state: to be sent with the next request
    missing_words: list[str] | None = None  # of force_words; there where some were asked for


class Generation(Strict):
    """The best sequences, best first. `seed` is there where sampling was asked for: it repeats the answer. With
    output_attentions, the positions of a text are its `source_tokens`, those of a picture the cells of its
    `source_grid` (rows, columns), row by row; frames and steps are as they were given."""

    sequences: list[Sequence]
    state_exact: bool | None = None  # see Resumed
    seed: int | None = None
    source_tokens: list[str] | None = None
    source_grid: list[int] | None = None


class GenerateResponse(Response):
    results: list[Generation]
    model_config = _example({"sequences": [{"text": "Ein Hund rennt.", "score": -0.41, "finish_reason": "eos"}]}, 5, 5)


class Scoring(Strict):
    """`score` is the log-probability of the whole target in nats, end of sequence included; `offsets` are where in the
    target each token begins."""

    score: float
    logprobs: list[float]
    tokens: list[str]
    offsets: list[int]


class ScoreResponse(Response):
    results: list[Scoring]
    model_config = _example(
        {"score": -0.9, "logprobs": [-0.7, -0.2], "tokens": ["Hund", "<eos>"], "offsets": [0, 4]}, 3, 2
    )


class ModelCard(Strict):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "local"
    task: str
    input: str
    revision: str
    aliases: list[str]


class ModelList(Strict):
    """refused: names under which another model was wanted that could not be served; what had the name goes on."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    refused: list[str]


class ErrorDetail(Strict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(Strict):
    error: ErrorDetail
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "num_beams is 64, but this server allows at most 16",
                    "type": "invalid_request_error",
                    "param": "num_beams",
                    "code": "limit_exceeded",
                }
            }
        }
    )
