"""Recipe: one training run, as data. Strict and frozen; `parsing` makes it from a YAML file and overrides.

Knows every setting and which settings contradict each other; knows no data and no tensor. Names are Hugging Face's
where Hugging Face has one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as check

from seqmodels.config import ModelConfig, ProblemType, Strict, Task
from seqmodels.decoding.params import SearchParams
from seqmodels.errors import ConfigError
from training.transfer import fields_from

InputKind = Literal["text", "image", "frames", "features", "nothing"]

# What `run.metric_for_best_model` may be; the first is the default. Those in LOWER_IS_BETTER fall as a model learns.
METRICS: dict[Task, tuple[str, ...]] = {
    "classify": ("accuracy", "macro_f1", "nll"),
    "tag": ("accuracy", "span_f1", "nll"),
    # chrF first: BLEU is 0, or luck, where targets are shorter than four words.
    "translate": ("chrf", "bleu", "exact_match", "nll"),
    "caption": ("cider_d", "cider", "bleu_4", "rouge_l", "chrf", "bleu", "exact_match", "nll"),
    "generate": ("nll", "perplexity", "bits_per_character"),
}
METRICS_OF_PROBLEMS: dict[ProblemType, tuple[str, ...]] = {
    "single_label_classification": METRICS["classify"],
    "multi_label_classification": ("micro_f1", "macro_f1", "exact_match", "nll"),
    "regression": ("mse", "mae", "r2", "nll"),
}
LOWER_IS_BETTER = {"nll", "perplexity", "bits_per_character", "mse", "mae"}


def merit(metric: str, scores: Mapping[str, float]) -> tuple[float, float]:
    """The larger, the better: the score that decides, and the nll, which decides among equal scores: BLEU, for one,
    stays 0 until four words in a row are right. What is no number is worse than any."""
    score = -scores[metric] if metric in LOWER_IS_BETTER else scores[metric]
    score, minus_nll = (-math.inf if math.isnan(one) else one for one in (score, -scores["nll"]))
    return score, minus_nll


Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
# Far above what any training survives, and far below what makes weights infinite in one step.
Rate = Annotated[float, Field(gt=0.0, le=1000.0)]


class ColumnsSection(Strict):
    """Which columns of the data are used. Several target columns are several references for one input."""

    input: str | None = None  # nothing goes in where the task is `generate`
    target: str | Annotated[tuple[str, ...], Field(min_length=1)]

    @check(mode="after")
    def _check(self) -> Self:
        if twice := [name for name in self.targets if self.targets.count(name) > 1]:
            raise ValueError(f"data.columns.target names {twice[0]!r} twice; name each column once")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


class SplitsSection(Strict):
    """The data set's own names for its splits."""

    train: str = "train"
    validation: str = "validation"
    test: str = "test"


class CutSection(Strict):
    """How much to cut from the training split for a split that the data does not have: a share, or a number of rows."""

    validation: Fraction | PositiveInt | None = None
    test: Fraction | PositiveInt | None = None
    seed: NonNegativeInt = 1


class TokenizerSection(Strict):
    """Trained from the training split. The library's unigram training differs a little from run to run: with it, a run
    can go on exactly, but not be repeated to the bit from its beginning."""

    kind: Literal["bpe", "unigram", "word", "character", "byte"] = "bpe"
    vocab_size: Annotated[int, Field(ge=8)] = 8000
    lowercase: bool = False
    # bpe: how often a merge is passed over, in texts that are trained on, anew each time (Provilkov et al. 2020)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @check(mode="after")
    def _check(self) -> Self:
        if self.dropout and self.kind != "bpe":
            raise ValueError(f"data.tokenizer.dropout is for kind 'bpe', but kind is {self.kind!r}; remove it")
        if self.kind == "byte" and self.vocab_size != type(self).model_fields["vocab_size"].default:
            raise ValueError("data.tokenizer.vocab_size does nothing where kind is 'byte', which has 260; remove it")
        return self


class AugmentationSection(Strict):
    """How pictures are changed each time that they are trained on (Krizhevsky et al. 2012): captions and classes that
    tell left from right need mirror 0."""

    least_area: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # a part is shown, of so much of the picture at least
    mirror: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # how often left and right change places

    @check(mode="after")
    def _check(self) -> Self:
        if self.least_area == 1.0 and self.mirror == 0.0:
            raise ValueError("data.augmentation changes nothing; set least_area below 1 or mirror above 0")
        return self


class DataSection(Strict):
    """Where rows come from, and how they become tokens."""

    id: str | None = None  # a data set on the Hugging Face hub
    name: str | None = None  # its configuration, where it has several
    revision: str | None = None
    path: str | None = None  # a local folder or file with the same columns; goes before `id`
    generated: str | None = None  # one of training.data.generated.DATA_SETS
    columns: ColumnsSection | None = None
    splits: SplitsSection = SplitsSection()
    cut: CutSection = CutSection()
    label_names: tuple[str, ...] = ()  # for class numbers without names in the data
    license: str = "not stated"  # of the data; goes into the model card
    tokenizer: TokenizerSection = TokenizerSection()
    input_vectors: str | None = None  # a text file of word vectors: the embeddings that the encoder begins with ...
    target_vectors: str | None = None  # ... and those of the decoder; the tokenizer's kind must be `word`
    backbone_weights: str | None = None  # a safetensors file, or a model of the hub, that the backbone begins with
    augmentation: AugmentationSection | None = None  # of pictures that are trained on
    max_input_length: PositiveInt = 256  # tokens, frames or steps
    max_target_length: PositiveInt = 256  # tokens
    chunk_length: PositiveInt = 64  # language models: steps between two cuts of back-propagation
    vary_chunk_length: bool = False  # language models: draw each length around that one (Merity et al. 2018)

    @check(mode="after")
    def _check(self) -> Self:
        if self.generated is not None and (self.id or self.path or self.columns):
            raise ValueError("data.generated brings its own rows; remove data.id, data.path and data.columns")
        if self.generated is not None and (self.cut.validation is not None or self.cut.test is not None):
            raise ValueError("data.generated brings its own splits; remove data.cut")
        if not (self.generated or self.id or self.path):
            raise ValueError("data names no source; set data.id, data.path or data.generated")
        if not self.generated and self.columns is None:
            raise ValueError("data.columns is missing; name the columns, such as {input: text, target: label}")
        if self.id is None and (self.revision or self.name):
            raise ValueError("data.revision and data.name belong to data.id, which is not set")
        for number, name in enumerate(self.label_names):
            if name.isdecimal() and name != str(number):
                raise ValueError(
                    f"data.label_names gives class number {number} the name {name!r}, which reads as another class "
                    "number; use words"
                )
        if self.generated is not None and (self.label_names or self.splits != SplitsSection()):
            raise ValueError(
                "data.generated names its labels and splits itself; remove data.label_names and data.splits"
            )
        return self

    @property
    def origin(self) -> str:
        """Where rows come from, in words."""
        return self.path or self.id or f"{self.generated} (generated by this project)"


class OptimSection(Strict):
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"] = "adam"
    learning_rate: Rate = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # sgd and rmsprop
    nesterov: bool = False  # sgd
    lr_scheduler_type: Literal["constant", "cosine", "cosine_with_restarts", "inverse_sqrt", "plateau"] = "constant"
    num_cycles: PositiveInt = 1  # of cosine_with_restarts: how often the rate falls from its full height to 0
    warmup_steps: NonNegativeInt = 0
    plateau_factor: Fraction = 0.5  # what the rate is multiplied by ...
    plateau_patience: PositiveInt = 1  # ... after this many validations without a better score
    max_grad_norm: PositiveFloat | None = 1.0
    clip_value: PositiveFloat | None = None
    # eta: variance eta / (1 + step) ** 0.55 is added (Neelakantan et al. 2015)
    gradient_noise: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    freeze: tuple[str, ...] = ()  # patterns of parameter names, such as "encoder.*"
    # By pattern: the step from which it learns (Howard and Ruder 2018); what its rate is multiplied by, where the first
    # pattern that matches counts.
    unfreeze_steps: dict[str, PositiveInt] = Field(default_factory=dict)
    learning_rate_factors: dict[str, Rate] = Field(default_factory=dict)

    @check(mode="after")
    def _check(self) -> Self:
        if self.momentum and self.optimizer not in ("sgd", "rmsprop"):
            raise ValueError(f"optim.momentum does nothing for {self.optimizer}; use sgd or rmsprop, or remove it")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("optim.nesterov needs optim.optimizer=sgd and a momentum above 0")
        if self.lr_scheduler_type == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("optim.lr_scheduler_type is inverse_sqrt, which needs optim.warmup_steps above 0")
        if (self.plateau_factor, self.plateau_patience) != (0.5, 1) and self.lr_scheduler_type != "plateau":
            raise ValueError("optim.plateau_factor and plateau_patience need optim.lr_scheduler_type=plateau")
        if (self.num_cycles > 1) != (self.lr_scheduler_type == "cosine_with_restarts"):
            raise ValueError("optim.num_cycles above 1 and optim.lr_scheduler_type=cosine_with_restarts go together")
        return self


class RunSection(Strict):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # what torch takes
    num_train_epochs: PositiveInt | None = None  # where max_steps is set too, the run ends with what comes first
    max_steps: PositiveInt | None = None
    # Stops by the clock: such a run cannot be repeated to the bit, and is finished, so that it cannot be lengthened.
    max_minutes: PositiveFloat | None = None
    tokens_per_batch: PositiveInt = 4096  # padded positions of a batch, input and target together
    rows_per_batch: PositiveInt = 256  # at most
    gradient_accumulation_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = None  # None: after each epoch
    max_eval_samples: PositiveInt | None = None  # rows drawn by the seed, while training; `evaluate` takes all
    logging_steps: PositiveInt = 20
    save_steps: PositiveInt = 500  # and at each validation
    early_stopping_patience: PositiveInt | None = None  # validations without a better score
    metric_for_best_model: str | None = None  # None: the task's first in METRICS, span F1 where labels are BIO
    ema_decay: Fraction | None = None  # validate and keep the moving average of the weights
    average_best: Annotated[int, Field(ge=2)] | None = None  # at the end, the mean of so many best validated models ...
    average_last: Annotated[int, Field(ge=2)] | None = (
        None  # ... or of the last: kept if it scores better than the best
    )
    # The reward, of each text, that sampled texts are to raise over greedy ones (Rennie et al. 2017).
    self_critical: Literal["chrf", "bleu", "exact_match", "cider_d"] | None = None
    self_critical_weight: Fraction = 0.9  # its share of the loss; the rest is the usual one
    # Each row is read twice a step, and what it says with one dropout and the other is to be alike (Liang et al. 2021).
    r_drop: PositiveFloat | None = None  # how much: the paper's alpha, 5 for translation there, 1 for classification
    keep_snapshots: bool = False  # the model at the end of each cycle of the rate, in snapshots/ (Huang et al. 2017)
    bf16: bool = False  # forward pass and gradients in bfloat16 where that is safe; weights and sums in float32
    fp16: bool = False  # the same in float16, the loss scaled so that small gradients stay; CUDA only
    workers: PositiveInt = 1  # processes that share the rows of each batch, on this machine or a Ray cluster
    # Of each worker; None: torch decides, or 1 where there are several workers. Tens of thousands end the process.
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    output_dir: str | None = None  # None: models/ and the recipe's name

    @check(mode="after")
    def _check(self) -> Self:
        if self.num_train_epochs is None and self.max_steps is None:
            raise ValueError("run has no end; set run.num_train_epochs or run.max_steps")
        if self.self_critical is None and self.self_critical_weight != 0.9:
            raise ValueError("run.self_critical_weight does nothing without run.self_critical; set both, or neither")
        if self.average_best and self.average_last:
            raise ValueError("run.average_best and run.average_last are both set; choose one")
        if self.bf16 and self.fp16:
            raise ValueError("run.bf16 and run.fp16 are both set; choose one")
        if self.fp16 and self.device == "cpu":
            raise ValueError("run.fp16 needs run.device=cuda; on a CPU use run.bf16")
        if self.workers > self.rows_per_batch:
            raise ValueError(
                f"run.workers is {self.workers}, but run.rows_per_batch is {self.rows_per_batch}, so that some would "
                "have no row; lower the one or raise the other"
            )
        return self


class Recipe(Strict):
    """One training run. `model` is the plain mapping of ModelConfig, less what data decides."""

    task: Task
    data: DataSection
    model: dict[str, Any]
    optim: OptimSection = OptimSection()
    run: RunSection
    generation: SearchParams = SearchParams()

    @check(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.model.get("init_from", ""), str):
            raise ValueError(
                f"model.init_from is {self.model['init_from']!r}, but must be the path of a model directory"
            )
        metric = self.run.metric_for_best_model
        if metric is not None and metric not in self.metrics:
            raise ValueError(f"run.metric_for_best_model is {metric!r}; task {self.task} has {_list(self.metrics)}")
        if not self.makes_text and self.generation != SearchParams():
            raise ValueError(f"generation is set, but task {self.task} generates nothing; remove it")
        columns = self.data.columns
        if columns is not None and (columns.input is None) != (self.task == "generate"):
            raise ValueError(
                "data.columns.input must be left out: a language model reads nothing but its target"
                if columns.input
                else "data.columns.input is missing; name the column to read"
            )
        self._check_what_does_nothing()
        return self

    def _check_what_does_nothing(self) -> None:
        data = self.data
        if "init_from" in self.model and data.tokenizer != TokenizerSection():
            raise ValueError(
                "model.init_from brings the saved model's tokenizer; remove data.tokenizer, or set it to {}"
            )
        if self.task != "generate" and data.chunk_length != DataSection.model_fields["chunk_length"].default:
            raise ValueError(f"data.chunk_length is for language models, but task is {self.task!r}; remove it")
        if self.task != "generate" and data.vary_chunk_length:
            raise ValueError(f"data.vary_chunk_length is for language models, but task is {self.task!r}; remove it")
        if self.run.keep_snapshots and self.optim.lr_scheduler_type != "cosine_with_restarts":
            raise ValueError("run.keep_snapshots needs optim.lr_scheduler_type=cosine_with_restarts")
        several = self.makes_text or self.problem_type == "regression"
        if not several and isinstance(getattr(data.columns, "target", None), tuple):
            raise ValueError(f"data.columns.target is a list, but task {self.task} has one target; name one column")
        streams = max(1, self.run.tokens_per_batch // data.chunk_length)
        if self.task == "generate" and self.run.workers > streams:
            raise ValueError(
                f"run.workers is {self.run.workers}, but run.tokens_per_batch of {self.run.tokens_per_batch} holds "
                f"{streams} chunks of data.chunk_length {data.chunk_length}; lower the one or raise the other"
            )
        if self.run.self_critical and self.run.r_drop:
            raise ValueError("run.self_critical and run.r_drop are both set; choose one")
        if self.run.self_critical and self.task not in ("translate", "caption"):
            raise ValueError(
                f"run.self_critical is {self.run.self_critical!r}, but task {self.task} writes no text for an input; "
                "remove it"
            )
        if self.run.self_critical == "cider_d" and self.task != "caption":
            raise ValueError(
                f"run.self_critical is 'cider_d', which is of captions with several references, but task is "
                f"{self.task!r}; use chrf or bleu"
            )
        if self.run.self_critical and "init_from" not in self.model:
            raise ValueError(
                f"run.self_critical is {self.run.self_critical!r}, which is learned from what a trained model writes; "
                "name one in model.init_from"
            )
        default = DataSection.model_fields["max_target_length"].default
        if self.task not in ("translate", "caption") and data.max_target_length != default:
            raise ValueError(f"data.max_target_length does nothing for task {self.task}; remove it")
        if several and data.label_names:
            what = "a regression" if self.problem_type == "regression" else f"task {self.task}"
            raise ValueError(f"data.label_names is set, but {what} has no labels; remove it")

    @property
    def makes_text(self) -> bool:
        return self.task in ("translate", "caption", "generate")

    @property
    def problem_type(self) -> ProblemType:
        """What a classifier is asked for; of other tasks the first, whatever model they begin from. Whether the model's
        section is right, `model_config_with` tells."""
        if self.task != "classify":
            return "single_label_classification"
        given = self.model.get("problem_type")
        if given is None and self.init_from is not None:
            return _saved_config(self.init_from).problem_type
        return given if given in tuple(METRICS_OF_PROBLEMS) else "single_label_classification"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `run.metric_for_best_model` may be, the default first."""
        return METRICS_OF_PROBLEMS[self.problem_type] if self.task == "classify" else METRICS[self.task]

    def metric(self, has_spans: bool) -> str:
        """What decides which model is best. has_spans: whether a tagger's labels are BIO."""
        return self.run.metric_for_best_model or ("span_f1" if has_spans else self.metrics[0])

    @property
    def init_from(self) -> Path | None:
        """The model directory to start from, if any."""
        return Path(self.model["init_from"]) if "init_from" in self.model else None

    @property
    def input(self) -> InputKind:
        """What the model reads; decides how rows are encoded."""
        return self.model_config_with(Facts.unknown()).input

    def model_config_with(self, facts: "Facts") -> ModelConfig:
        """The model's config, completed with what the data decided. Raises ConfigError."""
        if self.init_from is not None:
            fields = fields_from(_saved_config(self.init_from), self.model)
            return ModelConfig.parse(self._with_targets(fields, facts))
        fields = {**self.model}
        for part, size in (("encoder", facts.source_vocab_size), ("decoder", facts.target_vocab_size)):
            if isinstance(fields.get(part), dict) and (part == "decoder" or fields[part].get("input") == "text"):
                fields[part] = {**fields[part], "vocab_size": size}
        if isinstance(fields.get("encoder"), dict) and fields["encoder"].get("input") == "features":
            fields["encoder"] = {**fields["encoder"], "feature_size": facts.feature_size}
        return ModelConfig.parse(self._with_targets(fields, facts))

    def _with_targets(self, fields: dict[str, Any], facts: "Facts") -> dict[str, Any]:
        fields = {**fields, "max_source_length": self.data.max_input_length}
        if fields.get("architecture") in ("classifier", "tagger"):
            fields["labels"] = list(facts.labels)
        if fields.get("problem_type") == "regression":
            fields |= {"target_mean": list(facts.target_mean), "target_std": list(facts.target_std)}
        return fields


@dataclass(frozen=True)
class Facts:
    """What only data can tell about a model."""

    source_vocab_size: int = 0
    target_vocab_size: int = 0
    labels: tuple[str, ...] = ()
    feature_size: int = 0
    target_mean: tuple[float, ...] = ()  # of a regression's targets
    target_std: tuple[float, ...] = ()

    @classmethod
    def unknown(cls) -> "Facts":
        """Stands in until data is read, so that a bad `model` section fails in the first second."""
        return cls(8, 8, ("A", "B"), 1, (0.0, 0.0), (1.0, 1.0))


def _saved_config(directory: Path) -> ModelConfig:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.init_from is {str(directory)!r}, which holds no config.json; name a model directory")
    try:
        return ModelConfig.load(directory / "config.json")
    except ConfigError as error:
        raise ConfigError(f"model.init_from is {str(directory)!r}, which cannot be loaded: {error}") from None


def some(names: Iterable[str]) -> str:
    """The first five, and how many more."""
    names = list(names)
    return _list(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
