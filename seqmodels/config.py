"""ModelConfig: what a model is, as data. Strict, frozen, JSON in and out.

Knows the sizes and kinds of every part; knows no tensor. The sizes that data decides (`vocab_size`, `labels`,
`feature_size`) have no default: training fills them in before a model is built.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from seqmodels.errors import ConfigError

Cell = Literal["rnn_tanh", "rnn_relu", "gru", "lstm", "min_gru", "min_lstm"]
MINIMAL: tuple[Cell, ...] = ("min_gru", "min_lstm")  # without a recurrent matrix (Feng et al. 2024)
AttentionKind = Literal["none", "dot", "general", "additive"]
Weights = Literal["float32", "int8", "float16", "bfloat16"]  # of a decoder's step; int8 on CPUs, the last two on GPUs
Average = Literal["probability", "logprob"]  # of what the members of an ensemble predict
Pooling = Literal["last", "mean", "max", "attention"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Task = Literal["classify", "tag", "translate", "caption", "generate"]
UNION_MEMBER = re.compile(r"(constrained|function)-.*|[a-z-]+\[.*\]|float|int|str|bool|tuple|dict", re.DOTALL)
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    """Base of all that crosses a file or the wire: an unknown or mistyped field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RecurrentConfig(Strict):
    """A stack of recurrent layers."""

    cell: Cell = "lstm"
    hidden_size: PositiveInt = 256
    num_layers: Annotated[int, Field(ge=1, le=32)] = 1
    bidirectional: bool = False
    residual: bool = False  # add each layer's input to its output, from the second layer on
    dropout: Probability = 0.0  # between layers
    weight_dropout: Probability = 0.0  # of single recurrent weights, the same at all steps (Merity et al. 2018)
    layer_norm: bool = False  # of what gates are made of, and of an LSTM's cell as it is read (Ba et al. 2016)
    zoneout: Probability = 0.0  # of hidden units, which keep their old value at a step (Krueger et al. 2017)
    cell_zoneout: Probability = 0.0  # the same of an LSTM's cell
    memory_length: Annotated[int, Field(ge=3)] | None = None  # steps of keeping at first (Tallec and Ollivier 2018)

    @property
    def output_size(self) -> int:
        return self.hidden_size * (2 if self.bidirectional else 1)

    @model_validator(mode="after")
    def _check_cell(self) -> Self:
        if self.cell_zoneout and self.cell != "lstm":
            raise ValueError(
                f"cell_zoneout is {self.cell_zoneout}, but {self.cell} has no state beside its hidden one; "
                "set zoneout, or use cell lstm"
            )
        if self.memory_length and self.cell not in ("lstm", "gru"):
            raise ValueError(
                f"memory_length is {self.memory_length}, but {self.cell} has no gates that it could set; use cell "
                "lstm or gru, or remove it"
            )
        for name in ("weight_dropout", "layer_norm"):
            if self.cell in MINIMAL and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but {self.cell} has no recurrent matrix for it to act on; "
                    f"remove {name}, or use cell {self.cell.removeprefix('min_')}"
                )
        return self


class BackboneConfig(Strict):
    """A compact residual CNN (He et al. 2016) to train from nothing: a stem, then stages that halve the picture."""

    kind: Literal["compact"] = "compact"
    image_size: tuple[PositiveInt, PositiveInt] = (32, 32)  # height, width in pixels
    in_channels: Literal[1, 3] = 3
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)] = (16, 32, 64)
    blocks_per_stage: Annotated[int, Field(ge=1, le=32)] = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features of a picture."""
        return _shrunk(self.image_size, 2 ** (len(self.channels) - 1))

    @property
    def output_size(self) -> int:
        """Features of each cell of the grid."""
        return self.channels[-1]


class PublishedBackboneConfig(Strict):
    """A CNN of which trained weights are published: a ResNet (He et al. 2016), MobileNetV2 (Sandler et al. 2018)."""

    kind: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
    image_size: tuple[PositiveInt, PositiveInt] = (224, 224)  # height, width in pixels
    in_channels: Literal[3] = 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features of a picture."""
        return _shrunk(self.image_size, 32)

    @property
    def output_size(self) -> int:
        """Features of each cell of the grid."""
        return {"mobilenet_v2": 320, "resnet18": 512, "resnet34": 512}.get(self.kind, 2048)


def _shrunk(size: tuple[int, int], by: int) -> tuple[int, int]:
    return -(-size[0] // by), -(-size[1] // by)


def _backbone_of(value: Any) -> str:
    """Which of the two: it need not be said of the compact one."""
    kind = value.get("kind", "compact") if isinstance(value, dict) else getattr(value, "kind", "compact")
    return "compact" if kind == "compact" else "published"


AnyBackboneConfig = Annotated[
    Annotated[BackboneConfig, Tag("compact")] | Annotated[PublishedBackboneConfig, Tag("published")],
    Discriminator(_backbone_of),
]


class StackConfig(Strict):
    """What encoders and decoders with a recurrent stack have in common."""

    recurrent: RecurrentConfig = RecurrentConfig()
    dropout: Probability = 0.0  # on what the stack reads, and on the outputs
    input_dropout: Probability | None = None  # on what the stack reads, where that is not as `dropout`
    locked_dropout: bool = False  # one mask for all steps of a row, between layers too (Gal and Ghahramani 2016)

    @property
    def rate_on_inputs(self) -> float:
        return self.dropout if self.input_dropout is None else self.input_dropout

    @model_validator(mode="after")
    def _check_dropout(self) -> Self:
        between = self.recurrent.dropout if self.recurrent.num_layers > 1 else 0.0
        if self.locked_dropout and not (self.dropout or self.input_dropout or between):
            raise ValueError(
                "locked_dropout does nothing where no dropout is above 0; set dropout, input_dropout or "
                "recurrent.dropout (between layers), or remove it"
            )
        return self

    @property
    def output_size(self) -> int:
        return self.recurrent.output_size


class CharacterConfig(Strict):
    """An LSTM over the spelling of each word, in both directions."""

    embedding_size: PositiveInt = 32
    hidden_size: PositiveInt = 64  # of each direction
    max_length: Annotated[int, Field(ge=2)] = 24  # bytes of UTF-8; a longer word is read without its middle


class TextEncoderConfig(StackConfig):
    input: Literal["text"] = "text"
    vocab_size: PositiveInt
    embedding_size: PositiveInt = 256
    embedding_dropout: Probability = 0.0  # of whole words, at all their places in a batch (Gal and Ghahramani 2016)
    characters: CharacterConfig | None = None  # taggers: each token is read with the spelling of its word


class ImageEncoderConfig(Strict):
    input: Literal["image"] = "image"
    backbone: AnyBackboneConfig = BackboneConfig()
    dropout: Probability = 0.0  # of the grid, which attention looks at
    summary_dropout: Probability = 0.0  # of the vector, with which a decoder begins

    @property
    def output_size(self) -> int:
        return self.backbone.output_size


class FrameEncoderConfig(StackConfig):
    input: Literal["frames"] = "frames"
    backbone: AnyBackboneConfig = BackboneConfig()


class FeatureEncoderConfig(StackConfig):
    input: Literal["features"] = "features"
    feature_size: PositiveInt


ENCODERS: dict[str, type[Strict]] = {
    "text": TextEncoderConfig,
    "image": ImageEncoderConfig,
    "frames": FrameEncoderConfig,
    "features": FeatureEncoderConfig,
}  # by what they read
EncoderConfig = Annotated[
    TextEncoderConfig | ImageEncoderConfig | FrameEncoderConfig | FeatureEncoderConfig, Field(discriminator="input")
]


class DecoderConfig(StackConfig):
    """A recurrent decoder over tokens, with attention over the encoder's memory if there is one."""

    vocab_size: Annotated[int, Field(ge=4)]
    embedding_size: PositiveInt = 256
    embedding_dropout: Probability = 0.0  # of whole words, at all their places in a batch (Gal and Ghahramani 2016)
    attention: AttentionKind = "none"
    attention_from: Literal["last", "first"] = "last"  # whose outputs look; layers above the first read what it saw
    attention_gate: bool = False  # the outputs also say how much of what was seen counts (Xu et al. 2015)
    attention_penalty: NonNegativeFloat = 0.0  # in `loss`, for places that are not looked at once in all (the same)
    tie_embeddings: bool = False  # the output layer uses the embedding matrix (Press and Wolf 2017)
    # The share of tokens read in training that the model chose itself, at its end: it rises evenly from 0.
    scheduled_sampling: Probability = 0.0  # Bengio et al. 2015, in two passes as in Mihaylova and Martins 2019
    # AR and TAR (Merity et al. 2017), in `loss`; never in `nll`.
    activation_penalty: NonNegativeFloat = 0.0  # times the mean square of what the output layer reads
    temporal_activation_penalty: NonNegativeFloat = 0.0  # times that of the stack's changes from step to step
    # The same in every model of this format: each tokenizer begins with <pad>, <unk>, <bos>, <eos>.
    pad_token_id: Literal[0] = 0
    bos_token_id: Literal[2] = 2
    eos_token_id: Literal[3] = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recurrent.bidirectional:
            raise ValueError(
                "decoder.recurrent.bidirectional is true, but a decoder cannot read what it has not written"
            )
        self._check_attention()
        return self

    def _check_attention(self) -> None:
        if self.attention == "none":
            for name, default in (("attention_from", "last"), ("attention_gate", False), ("attention_penalty", 0.0)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"decoder.{name} is {value!r}, but decoder.attention is 'none'; choose dot, general or "
                        f"additive, or remove {name}"
                    )
        if self.attention_from == "first" and self.recurrent.num_layers < 2:
            raise ValueError(
                "decoder.attention_from is 'first', but decoder.recurrent.num_layers is 1, so that no layer would read "
                "what it saw; raise num_layers, or remove attention_from"
            )


class ModelConfig(Strict):
    """One model: `architecture` chooses the class, the rest its parts and sizes."""

    format_version: Literal[1] = 1
    architecture: Literal["classifier", "tagger", "generator"]
    encoder: EncoderConfig | None = None
    decoder: DecoderConfig | None = None
    labels: tuple[str, ...] = ()
    pooling: Pooling = "last"  # classifier only
    crf: bool = False  # tagger only: a label is chosen by what its neighbours are likely to be (Lample et al. 2016)
    problem_type: ProblemType = "single_label_classification"  # classifier only; of a regression, labels name numbers
    class_weights: dict[str, PositiveFloat] = Field(default_factory=dict)  # in `loss`, by label; 1 where left out
    temperature: PositiveFloat = 1.0  # what a classifier's or tagger's logits are divided by, see `training calibrate`
    target_mean: tuple[float, ...] = ()  # of each number of a regression, in the training split
    target_std: tuple[PositiveFloat, ...] = ()
    dropout: Probability = 0.0  # before the last linear layer
    label_smoothing: Probability = 0.0  # in `loss`; never in `nll`
    max_source_length: PositiveInt = 1024  # source positions that a request may fill

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.architecture == "generator":
            self._check_generator()
        else:
            self._check_labeller()
        return self

    def _check_generator(self) -> None:
        if self.decoder is None:
            raise ValueError("architecture is 'generator', which needs a `decoder` section")
        if self.labels or self.crf:
            raise ValueError(f"architecture is 'generator', which has no `{'labels' if self.labels else 'crf'}`")
        if self.class_weights or self.temperature != 1.0 or self.problem_type != "single_label_classification":
            raise ValueError("class_weights, temperature and problem_type are for classifiers and taggers; remove them")
        if self.characters:
            raise ValueError("encoder.characters is for taggers, which are given words; remove it")
        if self.encoder is None and self.decoder.attention != "none":
            raise ValueError(
                f"decoder.attention is {self.decoder.attention!r}, but without an encoder there is nothing to attend to"
            )
        hidden = self.decoder.recurrent.hidden_size
        if self.encoder and self.decoder.attention == "dot" and self.encoder.output_size != hidden:
            raise ValueError(
                f"decoder.attention is 'dot', which compares the encoder's {self.encoder.output_size} features "
                f"with the decoder's hidden_size of {hidden}: make them equal, or use 'general'"
            )

    def _check_labeller(self) -> None:
        if self.encoder is None:
            raise ValueError(f"architecture is {self.architecture!r}, which needs an `encoder` section")
        if self.decoder is not None:
            raise ValueError(f"architecture is {self.architecture!r}, which has no `decoder`")
        self._check_problem()
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels holds a name twice")
        if self.architecture != "tagger" and (self.characters or self.crf):
            name = "crf" if self.crf else "encoder.characters"
            raise ValueError(f"{name} is for taggers, which give a label to each word or step; remove it")
        if self.crf and (self.class_weights or self.label_smoothing):
            raise ValueError("crf is true, which needs label_smoothing 0 and class_weights {}; remove or set them")
        if self.architecture == "tagger" and self.encoder.input == "image":
            raise ValueError("architecture is 'tagger', but an image has no steps to label; use 'classifier'")

    def _check_problem(self) -> None:
        if self.architecture != "classifier" and self.problem_type != "single_label_classification":
            raise ValueError(f"problem_type is {self.problem_type!r}, which needs architecture 'classifier'")
        regression = self.problem_type == "regression"
        if len(self.labels) < (2 if self.problem_type == "single_label_classification" else 1):
            raise ValueError(f"labels holds {len(self.labels)} names; a {self.architecture} needs at least two")
        if regression and (self.class_weights or self.label_smoothing or self.temperature != 1.0):
            raise ValueError(
                "problem_type is 'regression', which has no class_weights, label_smoothing or temperature; remove them"
            )
        if not (len(self.target_mean) == len(self.target_std) == (len(self.labels) if regression else 0)):
            raise ValueError("target_mean and target_std hold one number for each label of a regression, else none")

    @property
    def input(self) -> Literal["text", "image", "frames", "features", "nothing"]:
        return self.encoder.input if self.encoder else "nothing"

    @property
    def needs_whole(self) -> str:
        """Why a classifier or tagger cannot read its input in pieces; "" where it can."""
        if self.input == "image":
            return "an image has no steps at which it could be cut"
        if isinstance(self.encoder, StackConfig) and self.encoder.recurrent.bidirectional:
            return "its encoder is bidirectional and begins at the end, too"
        return "its CRF compares the labels of the whole input" if self.crf else ""

    @property
    def characters(self) -> CharacterConfig | None:
        return self.encoder.characters if isinstance(self.encoder, TextEncoderConfig) else None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of source positions, where the input is a picture."""
        return self.encoder.backbone.grid if isinstance(self.encoder, ImageEncoderConfig) else None

    @property
    def task(self) -> Task:
        """The endpoint that serves this model; decided by what goes in and what comes out."""
        if self.architecture != "generator":
            return "classify" if self.architecture == "classifier" else "tag"
        if self.input == "nothing":
            return "generate"
        return "translate" if self.input == "text" else "caption"

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Build from plain data; raises ConfigError that names the field, its value and what is allowed."""
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ConfigError(f"{path.name}: {explain(error)}") from None

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


MEMBERS = {"encoder": ENCODERS, "backbone": ("compact", "published")}  # what pydantic names behind these fields


def explain(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """The first few faults of a validation error, each with its field and value.

    root: the model that was to be built; with it, an unknown key is told with the nearest that is known.
    """
    first = error.errors(include_url=False)[0]
    if root is not None and first["type"] == "extra_forbidden":
        return _explain_unknown([str(part) for part in first["loc"]], root)
    if first["type"] == "union_tag_not_found":  # of an encoder, whose kind decides what else it may hold
        field = ".".join(_fields_of(first["loc"]))
        return f"{field}.input is missing; set it to one of {', '.join(ENCODERS)}, or leave {field} out"
    faults: dict[tuple[str, str], list[str]] = {}  # by field and value: each member of a union finds a fault of its own
    for fault in error.errors(include_url=False):
        field = ".".join(_fields_of(fault["loc"]))
        value = fault.get("input")
        shown = f" (got {value!r})" if field and isinstance(value, str | int | float | bool | None) else ""
        messages = faults.setdefault((field, shown), [])
        message = str(fault["msg"]).removeprefix("Value error, ")
        if message not in messages:
            messages.append(message)
    # A fault without a field is about several at once, and its message names them.
    lines = [(f"{field}: " if field else "") + " or ".join(said) + shown for (field, shown), said in faults.items()]
    return "; ".join(lines[:5])


def _fields_of(location: Sequence[int | str]) -> list[str]:
    """Where a fault is, in our own fields. pydantic also names the member of a union that it tried, which is none: such
    as "constrained-float", or behind `encoder` the kind of its input."""
    parts = [str(part) for part in location]
    pairs = zip(["", *parts], parts, strict=False)
    return [part for before, part in pairs if not UNION_MEMBER.fullmatch(part) and part not in MEMBERS.get(before, ())]


def suggestion(key: str, names: Iterable[str]) -> str:
    """Words that name the nearest known key, or all of them."""
    names = sorted(names)
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}" if names else ""


def _explain_unknown(location: list[str], root: type[BaseModel]) -> str:
    section: type[BaseModel] | None = root
    for parent in location[:-1]:
        section = section_of(section, parent) if section else None
    names = list(section.model_fields) if section else []
    return f"{'.'.join(location)} is no setting{suggestion(location[-1], names)}"


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model class of a field, also where the field may be None."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
