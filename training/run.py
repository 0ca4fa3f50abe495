"""A run from recipe to model directory: prepare the run directory, train, finish.

recipe.yaml, run.json      what is trained on what; written before step 0, never changed
tokenizer.json, ...        trained from the training split, before step 0
encoded.safetensors        the training split as numbers, where it is text; until the run is finished
checkpoints/, validated/   to go on from; the best model so far
metrics.jsonl, timings.jsonl, tensorboard/
config.json, model.safetensors, README.md, report.html, finished.json      at the end: a model directory
"""

import fcntl
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError

from seqmodels.config import Average, Strict, explain
from seqmodels.ensemble import common_reader, load_members, revision_of
from seqmodels.errors import CheckpointError, ConfigError, DataError
from seqmodels.pretrained import RECIPE, load_pretrained, tokenizer_names
from seqmodels.rendering import is_bio
from seqmodels.tokenizer import Tokenizer
from training import baselines, checkpoint
from training.adaptive import Adaptation
from training.card import model_card
from training.config import DataSection, Facts, Recipe, RunSection, differences, parse_recipe, some
from training.data.batches import Batches, Buckets
from training.data.encoded import ENCODED, Encoded, is_encodable
from training.data.examples import Codec, Example
from training.data.rows import Row, fingerprint
from training.data.sources import Splits, load_rows
from training.data.streams import Streams
from training.evaluate import NONE, applicable, evaluate
from training.loop import Trainer, check_memory
from training.report import Reporter, write_report

RUN, FINISHED, SAMPLES = "run.json", "finished.json", "samples.json"
NUM_EXAMPLES_SHOWN = 3


class RunFile(Strict):
    """run.json: what a run must find unchanged when it goes on."""

    recipe: dict[str, Any]
    data: str  # fingerprint of the training and validation rows
    labels: tuple[str, ...]
    feature_size: int
    target_mean: tuple[float, ...] = ()  # of a regression
    target_std: tuple[float, ...] = ()
    tokenizers: tuple[str | None, str | None]  # fingerprints of the source's and the target's
    torch: str
    threads: PositiveInt


def train(recipe: Recipe) -> Path:
    """Train to the end, going on where an earlier call was interrupted; return the model directory.

    A finished run is left as it is. Raises ConfigError, DataError, CheckpointError.
    """
    assert recipe.run.output_dir is not None
    directory = Path(recipe.run.output_dir)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but torch finds no CUDA device; set run.device=cpu")
    with _refusals(directory), _locked(directory), Reporter(directory) as reporter:
        saved = _saved_run(directory, recipe)
        if (directory / FINISHED).is_file():
            reporter.say(f"{directory} is finished; nothing to do")
            return directory
        with _reading():
            rows = load_rows(recipe, say=reporter.say)
        codec = _prepare(directory, recipe, rows, saved, reporter)
        examples = _encoded(directory, codec, rows["train"])
        batches = _batches(recipe, codec, examples)
        _introduce(recipe, rows, codec, examples, batches, reporter)
        trainer = Trainer(
            recipe,
            directory,
            codec,
            batches,
            lambda candidate: _validate(recipe, codec, rows["validation"], candidate),
            _metric(recipe, codec),
            reporter,
        )
        best = trainer.run()
        _finish(recipe, trainer, best, len(examples))
        reporter.say(f"the best model, {_origin(trainer, best)}, is in {directory}; see its report.html")
    return directory


# Before step 0


@contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    """A disk that is full, or may only be read, ends a run; what was saved before is whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # safetensors writes by itself
        raise CheckpointError(
            f"{directory} could not be written to ({reason}). Mend that, such as by making room, and give the same "
            "command again: what was saved before is kept"
        ) from error


@contextmanager
def _reading() -> Iterator[None]:
    """What the system cannot read is the data's fault, not the run directory's."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or 'the data'} cannot be read: {error.strerror or error}") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two runs in one directory would ruin each other. The lock goes with the process, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"run.output_dir is {str(directory)!r}, where no directory can be written: {error.strerror}; name another"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is training in {directory}; wait for it, or set run.output_dir"
            ) from None
        yield


def _saved_run(directory: Path, recipe: Recipe) -> RunFile | None:
    """What an earlier call left, if it is of the same recipe."""
    saved = _read_run(directory)
    if saved is None:
        if (directory / "config.json").exists():
            raise ConfigError(f"run.output_dir {directory} holds a model that no run made; name another directory")
        return None
    for key, was, now in differences(_completed(saved.recipe), _plain(recipe)):
        raise CheckpointError(
            f"{directory} was begun with {key}={was}, but the recipe now says {now}; put it back, or name another "
            "run.output_dir"
        )
    return saved


def _read_run(directory: Path) -> RunFile | None:
    path = directory / RUN
    if not path.is_file():
        return None
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error)}; remove the directory to start again") from None


def _prepare(
    directory: Path, recipe: Recipe, rows: Mapping[str, Sequence[Row]], saved: RunFile | None, reporter: Reporter
) -> Codec:
    """Tokenizers and labels: trained and written, or read back and checked."""
    data = fingerprint(dict(rows))
    if saved is None:
        if recipe.init_from is None and (recipe.input == "text" or recipe.makes_text):
            reporter.say(f"training the {recipe.data.tokenizer.kind} tokenizer on {len(rows['train'])} rows")
        codec = Codec.train(recipe, rows["train"])
        check_memory(codec.config)  # first, so that the same directory serves a smaller model
        _write_run(directory, recipe, codec, data)
        return codec
    if saved.data != data:
        raise CheckpointError(
            f"{directory} was begun with other data (fingerprint {saved.data[:12]}, now {data[:12]}); bring the data "
            "back, or name another run.output_dir"
        )
    if (saved.torch, saved.threads) != (torch.__version__, torch.get_num_threads()):
        reporter.say(
            f"begun with torch {saved.torch} and {saved.threads} threads, now {torch.__version__} and "
            f"{torch.get_num_threads()}: the result may differ in its last bits"
        )
    source, target = (_read_tokenizer(directory, digest) for digest in saved.tokenizers)
    facts = Facts(0, 0, saved.labels, saved.feature_size, saved.target_mean, saved.target_std)
    return Codec.build(recipe, source, target, facts)


def _write_run(directory: Path, recipe: Recipe, codec: Codec, data: str) -> None:
    """All files of before step 0; run.json last, since it says that the others are there."""
    tokenizers = (codec.source_tokenizer, codec.target_tokenizer)
    for name, tokenizer in zip(tokenizer_names(codec.config), tokenizers, strict=True):
        if name and tokenizer:
            tokenizer.save(directory / f".{name}.writing")
            checkpoint.flush(directory / f".{name}.writing")
            (directory / f".{name}.writing").replace(directory / name)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    checkpoint.write_whole(directory / RECIPE, text)
    file = RunFile(
        recipe=_plain(recipe),
        data=data,
        labels=codec.config.labels,
        feature_size=getattr(codec.config.encoder, "feature_size", 0),
        target_mean=codec.config.target_mean,
        target_std=codec.config.target_std,
        tokenizers=(_digest(codec.source_tokenizer), _digest(codec.target_tokenizer)),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    checkpoint.write_whole(directory / RUN, file.model_dump_json(indent=2) + "\n")


def _read_tokenizer(directory: Path, digest: str | None) -> Tokenizer | None:
    """The tokenizer with the given fingerprint, whichever name it has here."""
    if digest is None:
        return None
    for path in directory.glob("*tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        if tokenizer.fingerprint == digest:
            return tokenizer
    raise CheckpointError(f"{directory} has no tokenizer with fingerprint {digest[:12]}; it was changed since step 0")


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return tokenizer.fingerprint if tokenizer else None


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version, with the defaults of the fields that have come since."""
    try:
        return _plain(parse_recipe(saved))
    except ConfigError:  # then the differences tell
        return saved


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, less where it is kept: a run directory may be moved."""
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    del fields["run"]["output_dir"]
    return fields


def _encoded(directory: Path, codec: Codec, rows: Sequence[Row]) -> Sequence[Example]:
    """The examples to train on; of text, in a file that an earlier call may have left."""
    if not is_encodable(codec.config):
        return codec.encode(rows)
    path, source = directory / ENCODED, checkpoint.sha256(directory / RUN)  # run.json names the data and tokenizers
    if (found := Encoded.load(path, source)) is not None:
        return found
    examples = Encoded.of(codec.examples(rows))
    examples.save(path, source)
    return Encoded.load(path, source) or examples  # mapped, in place of what is in memory


def _introduce(
    recipe: Recipe,
    rows: Mapping[str, Sequence[Row]],
    codec: Codec,
    examples: Sequence[Example],
    batches: Batches,
    reporter: Reporter,
) -> None:
    left_out = sum(len(row.references) if recipe.makes_text else 1 for row in rows["train"]) - len(examples)
    reporter.say(
        f"{recipe.task} on {_data_name(recipe.data)}: {len(examples)} examples to train on, "
        f"{len(rows['validation'])} rows to validate; {len(batches)} batches an epoch, "
        f"{batches.padding_share:.1%} padding"
    )
    if left_out:
        reporter.say(f"{left_out} examples are left out, being longer than data.max_input_length or max_target_length")
    if codec.config.labels and codec.config.problem_type != "regression":
        unseen = {label for row in rows["validation"] for label in row.references} - set(codec.config.labels)
        if unseen:
            names = some(sorted(unseen))
            reporter.say(f"the training split lacks labels of the validation split, which can never be right: {names}")
    reporter.show_examples(examples[:NUM_EXAMPLES_SHOWN], codec)


def _data_name(data: DataSection) -> str:
    return data.path or data.id or f"{data.generated} (generated by this project)"


def _batches(recipe: Recipe, codec: Codec, examples: Sequence[Example]) -> Batches:
    run, data = recipe.run, recipe.data
    if recipe.task == "generate":
        rows = min(run.rows_per_batch, max(1, run.tokens_per_batch // data.chunk_length))
        return Streams(examples, rows, data.chunk_length, run.seed, data.vary_chunk_length)
    return Buckets(examples, codec, run.tokens_per_batch, run.rows_per_batch, run.seed)


def _metric(recipe: Recipe, codec: Codec) -> str:
    """What decides which model is best."""
    if recipe.run.metric_for_best_model is not None:
        return recipe.run.metric_for_best_model
    return "span_f1" if recipe.task == "tag" and is_bio(codec.config.labels) else recipe.metrics[0]


def _validate(recipe: Recipe, codec: Codec, rows: Sequence[Row], candidate: Path) -> dict[str, float]:
    result = evaluate(candidate, _drawn(rows, recipe.run), codec, recipe.run.device)
    (candidate / SAMPLES).write_text(json.dumps(result.samples, ensure_ascii=False, indent=1), encoding="utf-8")
    return result.scores


def _drawn(rows: Sequence[Row], run: RunSection) -> Sequence[Row]:
    """At most max_eval_samples rows: a pure function of the seed, and not the first, which may all be of one kind."""
    if run.max_eval_samples is None or run.max_eval_samples >= len(rows):
        return rows
    places = random.Random(f"{run.seed}:validation").sample(range(len(rows)), run.max_eval_samples)
    return [rows[place] for place in sorted(places)]


# After the last step


def _finish(recipe: Recipe, trainer: Trainer, best: Path, num_examples: int) -> None:
    """Make the run directory a model directory: the best model, its card, and a report."""
    directory = trainer.directory
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = next(line["validation"] for line in reversed(lines) if line.get("best"))
    facts = {
        "Task": recipe.task,
        "Data": _data_name(recipe.data),
        "Licence of the data": recipe.data.license,
        "Training examples": num_examples,
        "Parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "Steps": f"{trainer.progress.step}; the best model is {_origin(trainer, best)}",
        "Minutes": round(trainer.progress.seconds / 60, 1),
        "Steps skipped (loss or gradient not finite)": trainer.progress.skipped,
        **{f"Validation {name}": f"{value:.4f}" for name, value in scores.items()},
    }
    load_pretrained(best).save(directory, model_card(directory.name, recipe, facts))
    samples = json.loads((best / SAMPLES).read_text(encoding="utf-8"))
    write_report(directory, f"Training {directory.name}", facts, samples)
    (directory / ENCODED).unlink(missing_ok=True)
    checkpoint.write_whole(
        directory / FINISHED, json.dumps({"step": trainer.progress.step, "validation": scores}) + "\n"
    )
    shutil.rmtree(directory / "validated")


def _origin(trainer: Trainer, best: Path) -> str:
    if best == trainer.best_directory:
        return f"of step {trainer.progress.best_step}"
    return f"the mean of {len(trainer.progress.kept)} validated ones"


# Afterwards


def evaluate_directory(
    directory: Path,
    recipe: Recipe,
    split: str,
    params: Mapping[str, Any],
    with_baseline: bool = False,
    loading: Mapping[str, Any] = MappingProxyType({}),
    others: Sequence[Path] = (),
    average: Average = "probability",
    adaptation: Adaptation = NONE,
) -> dict[str, Any]:
    """Score a finished model on one split of its data, or of other data, and write the result beside it.

    loading: see `evaluate`. others: models that answer with it as one, by the average of what all predict. Raises
    DataError for a split that is cut from other data than the run's: what was trained on could be in it; ConfigError
    for a loading option that changes nothing, and for models that do not fit together.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    directories = [directory, *others]
    members = load_members(directories)
    saved = common_reader(members)
    loading = applicable(saved.config, loading)  # before the data, which may take a while
    codec = Codec(
        saved.config, saved.source_tokenizer, saved.target_tokenizer, saved.preprocessor, recipe.data.max_target_length
    )
    with_train = with_baseline or adaptation.dynamic_rate > 0
    rows, *_ = [_rows_to_score(member, recipe, split, with_train) for member in directories]  # each checks its own
    result = evaluate(
        directories,
        rows[split],
        codec,
        recipe.run.device,
        dict(params),
        loading,
        average,
        adaptation,
        rows["train"] if adaptation.dynamic_rate else (),
    )
    scores = dict(result.scores)
    if with_baseline:
        name, score = _baseline(recipe, rows["train"], rows[split])
        scores[name] = score
    report = {
        "model": " ".join(member.name for member in directories),
        "revision": revision_of(members, average),
        "data": _data_name(recipe.data),
        "split": split,
        "rows": result.num_rows,
        "scores": scores,
        "signatures": result.signatures,
        "search": {**saved.generation.model_dump(mode="json", exclude_defaults=True), **params},
        "loading": loading,
    }
    ways = [name if value is True else str(value) for name, value in loading.items() if value not in ("float32", False)]
    if adaptation.ways:
        report["adaptation"] = adaptation.model_dump(exclude_defaults=True)
        ways += adaptation.ways
    if others:
        report["average"] = average
        ways.append(f"ensemble-{report['revision']}")
    checkpoint.write_whole(directory / _report_name(split, ways), json.dumps(report, indent=1) + "\n")
    return report


def _report_name(split: str, ways: Sequence[str]) -> str:
    """`evaluation-test.json`; other ways of loading have files of their own: `evaluation-test-int8-shortlist.json`."""
    return "-".join(["evaluation", split, *ways]) + ".json"


def _rows_to_score(directory: Path, recipe: Recipe, split: str, with_train: bool) -> dict[str, list[Row]]:
    """The split, and train where something else is learned from it."""
    splits, run = Splits(recipe), _read_run(directory)
    wanted = {split, "train"} if with_train else {split}
    if run is None:
        print(f"{directory} holds no {RUN}, so nothing tells whether the {split} split was trained on")
        return splits.rows(sorted(wanted), print)
    theirs = parse_recipe(run.recipe).data
    name = getattr(recipe.data.splits, split)
    if _data_name(recipe.data) != _data_name(theirs):
        print(f"scoring on {_data_name(recipe.data)}; the model was trained on {_data_name(theirs)}")
    elif split != "train" and name == theirs.splits.train:
        print(f"data.splits.{split} is {name!r}, which the model was trained on: the scores say nothing about new data")
    if not splits.is_cut(split):
        return splits.rows(sorted(wanted), print)
    rows = splits.rows(sorted(wanted | {"train", "validation"}), print)
    now = fingerprint({role: rows[role] for role in ("train", "validation")})
    if now != run.data:
        raise DataError(
            f"the {split} split is cut from other data than {directory} was trained on (fingerprint {run.data[:12]}, "
            f"now {now[:12]}), so its rows may have been trained on; bring data and data.cut back, or name a split "
            f"that the data itself has with data.splits.{split} (a single file is all of the split train)"
        )
    return rows


def _baseline(recipe: Recipe, train_rows: Sequence[Row], rows: Sequence[Row]) -> tuple[str, float]:
    match recipe.task, recipe.input:
        case "classify", "text":
            return "bag_of_words_baseline", baselines.bag_of_words(train_rows, rows)
        case "tag", "frames":
            return "single_frame_baseline", baselines.single_frame(train_rows, rows)
    raise ConfigError(f"there is no baseline for task {recipe.task} on {recipe.input}; leave out --baseline")
