"""Score a model directory on rows, or several that answer as one, through the same pipeline that serves them.

Generated text is generated freely, with the directory's own search defaults. A language model is scored by its
likelihood, forward only, the state carried from chunk to chunk.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from typing import Any

import torch

from seqmodels.config import Average, ModelConfig
from seqmodels.decoding.params import SearchParams
from seqmodels.ensemble import Averaged, Directories, as_paths, load_members
from seqmodels.errors import ConfigError, DataError, NotFiniteError, SeqModelsError
from seqmodels.models import Model, SequenceGenerator
from seqmodels.pipeline import Pipeline, load_shortlist
from seqmodels.pretrained import Pretrained
from seqmodels.rendering import bio_spans, is_bio
from seqmodels.state import State
from seqmodels.tokenizer import BOS
from training import captions, metrics
from training.adaptive import SEGMENT_LENGTH, Adaptation, Adaptive
from training.config import some
from training.data.batches import Buckets
from training.data.examples import Codec
from training.data.rows import Row
from training.data.streams import EVALUATION_ROWS, Streams
from training.report import Confusion

NO_ADAPTATION = Adaptation()
CHUNK_LENGTH = 128  # of running text; changes the speed only, since the state is carried
NLL_TOKENS_PER_BATCH, NLL_ROWS_PER_BATCH = 8192, 128
NUM_SAMPLES, NUM_FREE_SAMPLES, NUM_CAPTIONS = 8, 4, 10


@dataclass(frozen=True)
class Scored:
    """scores: by name. signatures: what exactly was measured, where that has a name. samples: some answers to read.
    kinds: of spans, a line for each kind, to read."""

    scores: dict[str, float]
    num_rows: int
    signatures: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    confusion: Confusion = field(default_factory=dict)  # of single labels: expected -> given -> how often
    kinds: list[dict[str, str]] = field(default_factory=list)


def score(
    directory: Directories,
    rows: Sequence[Row],
    codec: Codec,
    device: str = "cpu",
    params: dict[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    average: Average = "probability",
    adaptation: Adaptation = NO_ADAPTATION,
    train: Sequence[Row] = (),
) -> Scored:
    """All scores of the directory's task. params: search parameters that go before the directory's own. loading:
    options of `Pipeline.from_pretrained`, for what is generated. average: of several directories' predictions.
    adaptation: of a language model while it is scored; train: rows of its training split, where it learns from what it
    is scored on. Raises ConfigError, DataError."""
    loading = applicable(codec.config, loading or {})
    if not rows:
        raise DataError("there are no rows to evaluate on")
    members = load_members(directory, device)
    if codec.config.task == "generate":
        model = _language_model(members, codec, average, adaptation, train)
        scores = _score_language_model(model, rows, codec, device)
        return Scored(scores, len(rows), samples=_free_samples(members, average))
    if adaptation.ways:
        raise ConfigError(
            f"--dynamic-rate and --cache-weight are for language models; task {codec.config.task} has none"
        )
    shortlist = load_shortlist(as_paths(directory), members[0]) if loading.get("shortlist") else None
    pipeline = Pipeline(
        members, decoder_weights=loading.get("decoder_weights", "float32"), shortlist=shortlist, average=average
    )
    # A classifier reads the beginning of what is too long, in training as here; let the others do what they can.
    searches = _searches(codec.config, members[0].generation, params or {})
    jobs = [
        pipeline.prepare(_item(row, codec), search, truncate=True) for row, search in zip(rows, searches, strict=False)
    ]
    if codec.config.architecture == "generator":
        return _score_generated(
            rows, pipeline.outcomes(jobs), _mean_nll(_model(members, average), rows, codec, device), codec
        )
    answers = pipeline.run(jobs)
    nll = _mean_nll(_model(members, average), rows, codec, device)
    if codec.config.task == "classify":
        return SCORES[codec.config.problem_type](rows, answers, nll)
    read = [len(job.reading.positions) for job in jobs]
    return _score_tags(rows, answers, read, nll, is_bio(codec.config.labels))


def _score_generated(
    rows: Sequence[Row], answers: Sequence[dict[str, Any] | SeqModelsError], nll: float, codec: Codec
) -> Scored:
    """A model that has gone astray writes nothing where its numbers are not finite: a bad score, and no error."""
    texts = []
    for answer in answers:
        if isinstance(answer, SeqModelsError) and not isinstance(answer, NotFiniteError):
            raise answer
        texts.append("" if isinstance(answer, SeqModelsError) else answer["sequences"][0]["text"])
    scored = _score_texts(rows, texts, nll)
    return _with_caption_scores(scored, rows, texts) if codec.config.task == "caption" else scored


def _searches(config: ModelConfig, defaults: SearchParams, params: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of each row: one that samples draws the same whenever it is scored, by its number."""
    if config.architecture != "generator" or params.get("seed", defaults.seed) is not None:
        return repeat(params)
    return ({**params, "seed": number} for number in count(1))


def _item(row: Row, codec: Codec) -> Any:
    """As `Pipeline.prepare` takes it: of a picture, or of frames, whose grids are known, those."""
    if not codec.grids:
        return row.item
    grids = [codec.decode_picture(picture) for picture in row.pictures]
    return {"image": grids[0]} if codec.config.input == "image" else {"frames": torch.stack(grids)}


def applicable(config: ModelConfig, loading: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the search that a model's scores depend on: all, or none where it does not search for them.

    Raises ConfigError for one that is asked for and would change nothing.
    """
    if config.encoder and config.decoder:
        return dict(loading)
    for name, value in loading.items():
        if value not in ("float32", False):
            raise ConfigError(
                f"{name} is {value!r}, but a {config.architecture} of task {config.task} is scored without a search; "
                f"leave out --{name.replace('_', '-')}"
            )
    return {}


def _score_labels(rows: Sequence[Row], answers: Sequence[dict[str, Any]], nll: float) -> Scored:
    predicted, expected = [answer["label"] for answer in answers], [str(row.target) for row in rows]
    scores = {
        "accuracy": metrics.accuracy(predicted, expected),
        "macro_f1": metrics.macro_f1(predicted, expected),
        "nll": nll,
    }
    confusion = metrics.confusion(predicted, expected)
    return Scored(scores, len(rows), samples=_samples(rows, predicted), confusion=confusion)


def _score_several(rows: Sequence[Row], answers: Sequence[dict[str, Any]], nll: float) -> Scored:
    """Of rows that may have several labels."""
    predicted, expected = [set(answer["labels"]) for answer in answers], [set(row.references) for row in rows]
    by_label = metrics.counts_by_label(predicted, expected)
    scores = {
        "micro_f1": metrics.micro_f1(by_label),
        "macro_f1": metrics.mean_f1(by_label),
        "exact_match": sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(rows),
        "nll": nll,
    }
    return Scored(scores, len(rows), samples=_samples(rows, [", ".join(sorted(p)) for p in predicted], ", "))


def _score_numbers(rows: Sequence[Row], answers: Sequence[dict[str, Any]], nll: float) -> Scored:
    """Of a regression, as means over all its numbers."""
    predicted = [list(answer["values"].values()) for answer in answers]
    expected = [[float(number) for number in row.references] for row in rows]
    scores = {
        "mse": metrics.mean_square_error(predicted, expected),
        "mae": metrics.mean_absolute_error(predicted, expected),
        "r2": metrics.r2(predicted, expected),
        "nll": nll,
    }
    shown = [" ".join(f"{number:.6g}" for number in numbers) for numbers in predicted]
    return Scored(scores, len(rows), samples=_samples(rows, shown, " "))


SCORES = {
    "single_label_classification": _score_labels,
    "multi_label_classification": _score_several,
    "regression": _score_numbers,
}


def _score_tags(
    rows: Sequence[Row], answers: Sequence[dict[str, Any]], read: Sequence[int], nll: float, bio: bool
) -> Scored:
    """read: how many words or steps of each row the model was given; the tags of others are empty, so never right. BIO
    tags are compared as their spans are written, which is what is served: with B- at the beginning, whatever stands
    there in the data (IOB1) or is likeliest to the model."""
    tags_of = _tags_of_spans if bio else _tags_of_steps
    tagged = [tags_of(row, answer["tags"]) for row, answer in zip(rows, answers, strict=True)]
    predicted = [tags[:count] + [""] * (len(tags) - count) for tags, count in zip(tagged, read, strict=True)]
    expected = [_in_spans(row.references) if bio else list(row.references) for row in rows]
    flat_predicted, flat_expected = ([tag for tags in rows_ for tag in tags] for rows_ in (predicted, expected))
    scores = {"accuracy": metrics.accuracy(flat_predicted, flat_expected), "nll": nll}
    kinds = []
    if bio:
        found = [[tag or "O" for tag in tags] for tags in predicted]
        scores = {"span_f1": metrics.span_f1(found, expected), **scores}
        kinds = [
            {"kind": kind, **{name: f"{value:.4g}" for name, value in measures.items()}}
            for kind, measures in metrics.scores_by_kind(found, expected).items()
        ]
    samples = [_tagged(*one) for one in zip(rows[:NUM_SAMPLES], predicted, expected, strict=False)]
    confusion = metrics.confusion(flat_predicted, flat_expected)
    return Scored(scores, len(rows), samples=samples, confusion=confusion, kinds=kinds)


def _tagged(row: Row, tags: Sequence[str], expected: Sequence[str]) -> dict[str, str]:
    """Each word, or the number of each step, with its tag, and those that are wrong."""
    assert isinstance(row.input, tuple)
    steps = [step if isinstance(step, str) else str(number) for number, step in enumerate(row.input, start=1)]
    wrong = [
        f"{step}: {given or 'none'}, expected {right}"
        for step, given, right in zip(steps, tags, expected, strict=True)
        if given != right
    ]
    answer = "  ".join(f"{step}/{tag}" for step, tag in zip(steps, tags, strict=True))
    return {"answer": answer, "wrong": "\n".join(wrong)}


def _tags_of_steps(row: Row, tags: Sequence[dict[str, Any]]) -> list[str]:
    """One tag for each step; empty ones for steps beyond the model's longest input."""
    labels = [tag["label"] for tag in tags]
    return labels + [""] * (len(row.references) - len(labels))


def _tags_of_spans(row: Row, spans: Sequence[dict[str, Any]]) -> list[str]:
    """BIO tags of each word or step, from spans in characters of the words joined by spaces, or in steps."""
    assert isinstance(row.input, tuple)
    starts, position = [], 0
    for step in row.input:
        starts.append(position)
        position += len(step) + 1 if isinstance(step, str) else 1
    tags = ["O"] * len(starts)
    for span in spans:
        inside = [number for number, start in enumerate(starts) if span["start"] <= start < span["end"]]
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{span['label']}"
    return tags


def _in_spans(tags: Sequence[str]) -> list[str]:
    """BIO tags as their spans are written: with B- at the beginning of each."""
    found = ["O"] * len(tags)
    for name, first, end in bio_spans(tags):
        found[first:end] = [f"B-{name}", *[f"I-{name}"] * (end - first - 1)]
    return found


def _score_texts(rows: Sequence[Row], texts: Sequence[str], nll: float) -> Scored:
    references = [row.references for row in rows]
    cased, cased_signature = metrics.bleu(texts, references)
    lower, lower_signature = metrics.bleu(texts, references, lowercase=True)
    chrf, chrf_signature = metrics.chrf(texts, references)
    scores = {
        "bleu": cased,
        "bleu_lowercase": lower,
        "chrf": chrf,
        "exact_match": metrics.exact_match(texts, references),
        "nll": nll,
    }
    signatures = {"bleu": cased_signature, "bleu_lowercase": lower_signature, "chrf": chrf_signature}
    return Scored(scores, len(rows), signatures, _samples(rows, texts))


def _with_caption_scores(scored: Scored, rows: Sequence[Row], texts: Sequence[str]) -> Scored:
    """And those of the captioning evaluation."""
    candidates = [captions.tokens(text) for text in texts]
    references = [[captions.tokens(text) for text in row.references] for row in rows]
    scores = {f"bleu_{order}": score for order, score in enumerate(captions.bleu(candidates, references), start=1)}
    scores["rouge_l"] = captions.rouge_l(candidates, references)
    scores["cider"] = captions.cider(candidates, references)
    each = captions.Cider(references).scores(candidates, references)
    scores["cider_d"] = 100 * sum(each) / len(each)
    return replace(scored, scores=scores | scored.scores, samples=_from_best_to_worst(rows, texts, each))


def _from_best_to_worst(rows: Sequence[Row], texts: Sequence[str], each: Sequence[float]) -> list[dict[str, str]]:
    """Ten captions, by CIDEr-D and as far from each other in that order as can be: the worst among them too."""
    order = sorted(range(len(rows)), key=lambda number: -each[number])
    last = min(NUM_CAPTIONS, len(rows)) - 1
    places = [order[place * (len(order) - 1) // max(1, last)] for place in range(last + 1)]
    return [
        {
            "row": str(number + 1),
            "cider_d": f"{100 * each[number]:.1f}",
            "answer": texts[number],
            "expected": " / ".join(rows[number].references),
        }
        for number in places
    ]


def _model(members: Sequence[Pretrained], average: Average) -> Model | Averaged:
    models = [member.model for member in members]
    return models[0] if len(models) == 1 else Averaged(models, average)


@torch.no_grad()
def _mean_nll(model: Model | Averaged, rows: Sequence[Row], codec: Codec, device: str) -> float:
    """Nats per target, each target given those before it; rows that do not fit the model are left out.

    Raises DataError where nothing is left: 0 would look like the best of all scores.
    """
    examples = codec.encode(rows)
    if not examples:
        raise DataError("every row to evaluate on is longer than the model or data.max_target_length allows")
    batches = Buckets(examples, codec, NLL_TOKENS_PER_BATCH, NLL_ROWS_PER_BATCH, seed=0)
    total, count = 0.0, 0
    for index in range(len(batches)):
        out = model(**{name: value.to(device) for name, value in batches.batch(0, index).items()})
        total += float(out.nll) * int(out.num_targets)
        count += int(out.num_targets)
    if not count:
        raise DataError(
            f"no row to evaluate on has a label that the model knows ({some(codec.config.labels)}); name the column of "
            "labels with data.columns.target, or, where they are numbers, set model.problem_type=regression"
        )
    return total / count


def _language_model(
    members: Sequence[Pretrained],
    codec: Codec,
    average: Average,
    adaptation: Adaptation,
    train: Sequence[Row],
) -> Model | Averaged | Adaptive:
    model = _model(members, average)
    if not adaptation.ways:
        return model
    if not isinstance(model, SequenceGenerator):
        raise ConfigError("--dynamic-rate and --cache-weight are for one language model; give one directory")
    return Adaptive(model, adaptation, codec.encode(train))


@torch.no_grad()
def _score_language_model(
    model: Model | Averaged | Adaptive, rows: Sequence[Row], codec: Codec, device: str
) -> dict[str, float]:
    """nll counts words and ends of texts; a BOS in mid-stream is no word, though its small cost is counted."""
    sizes = (1, SEGMENT_LENGTH) if isinstance(model, Adaptive) else (EVALUATION_ROWS, CHUNK_LENGTH)
    streams = Streams(codec.encode(rows), *sizes)
    total, count, state = 0.0, 0, None
    for index in range(len(streams)):
        batch = {name: value.to(device) for name, value in streams.batch(0, index).items()}
        out = model(**batch, state=state)
        assert out.state is not None, "a language model gives one to go on from"
        state = State(out.state.values)
        total += float(out.nll) * int(out.num_targets)
        count += int(out.num_targets) - int((batch["labels"][:, 1:] == BOS).sum())
    if isinstance(model, Adaptive) and model.learns and not total / count < model.nll_of_a_guess:
        raise ConfigError(
            f"with --dynamic-rate the nll is {total / count:.4g}, worse than a guess: what was learned on the way may "
            "have diverged; lower it"
        )
    characters = sum(len(text) for row in rows for text in row.references)
    return {
        "nll": total / count,
        "perplexity": metrics.perplexity(total / count),
        "bits_per_character": metrics.bits_per_character(total, characters),
    }


def _free_samples(members: Sequence[Pretrained], average: Average) -> list[dict[str, str]]:
    """What the model writes of its own accord."""
    pipeline = Pipeline(members, average=average)
    jobs = [pipeline.prepare(None, {"seed": seed}) for seed in range(1, NUM_FREE_SAMPLES + 1)]
    return [
        {"seed": str(seed), "text": sequence["text"]}
        for seed, answer in enumerate(pipeline.outcomes(jobs), start=1)
        if not isinstance(answer, SeqModelsError)
        for sequence in answer["sequences"]
    ]


def _samples(rows: Sequence[Row], answers: Sequence[str], separator: str = " / ") -> list[dict[str, str]]:
    return [
        {"input": _readable(row), "answer": answer, "expected": separator.join(row.references)}
        for row, answer in zip(rows[:NUM_SAMPLES], answers, strict=False)
    ]


def _readable(row: Row) -> str:
    if isinstance(row.input, str):
        return row.input
    return "(picture)" if isinstance(row.input, bytes) else f"({len(row.input or ())} steps)"
