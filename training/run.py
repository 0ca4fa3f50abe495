"""A run from recipe to model directory: prepare its directory, train, finish."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.decoding.params import SearchParams
from seqmodels.errors import CheckpointError, ConfigError, DataError, InputError
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import RECIPE, Pretrained, load_pretrained
from seqmodels.rendering import is_bio
from training import checkpoint
from training.backbones import read_backbone
from training.candidates import VALIDATED
from training.card import model_card
from training.config import Recipe, RunSection, some
from training.data.batches import Batches, Buckets, lengths_of
from training.data.encoded import ENCODED, Encoded, is_encodable
from training.data.examples import Codec, Example
from training.data.grids import cache_directory
from training.data.pictures import preprocessor_for
from training.data.rows import Row, fingerprint
from training.data.sources import load_rows
from training.data.streams import Streams
from training.directory import (
    FINISHED,
    RUN,
    RunFile,
    is_under_way,
    locked,
    read_run,
    read_tokenizers,
    readable_run,
    refusals,
    saved_run,
    write_run,
)
from training.initial import check_frozen, check_memory, frozen_backbone, frozen_weights, keep_begin, new_model
from training.interrupts import termination_interrupts
from training.loop import Trainer
from training.objective import objective_of
from training.report import provenance, write_report
from training.reporter import Reporter, Silence
from training.scoring import score
from training.seen import keep_seen, rows_seen
from training.vectors import check_files, read_vectors
from training.workers import ALONE, Workers

SHOWN = "shown.json"  # of a validated model: outputs or confusions, for the report
NUM_EXAMPLES_SHOWN = 3
LOCK_WAIT_S = 30.0


def train(recipe: Recipe) -> Path:
    """Train to the end, going on where an earlier call was interrupted; return the model directory.

    A finished run is left as it is. Raises ConfigError, DataError, CheckpointError.
    """
    if recipe.run.workers == 1:
        return train_as(ALONE, recipe)
    assert recipe.run.output_dir is not None
    directory = Path(recipe.run.output_dir)
    with refusals(directory), locked(directory):  # in the first second, before Ray starts
        saved_run(directory, recipe)
        if (directory / FINISHED).is_file():
            print(_nothing_to_do(directory))
            return directory
    from training.distributed import train_together

    return train_together(recipe, train_as)


def _begin_on_gpu() -> None:
    """Raises ConfigError where there is none. cuDNN's recurrences sum in an order that varies from run to run unless
    cuBLAS has fixed workspaces, as torch's documentation of `nn.LSTM` says; it reads this when it is first used. Its
    convolutions are told as well."""
    if not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but torch finds no CUDA device; set run.device=cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    torch.backends.cudnn.deterministic = True


def train_as(workers: Workers, recipe: Recipe, voice: Callable[[Path], Reporter] = Reporter) -> Path:
    """`train`, as one of the workers that make the run together. voice: makes the Reporter of the first."""
    assert recipe.run.output_dir is not None
    directory = Path(recipe.run.output_dir)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.device == "cuda":
        _begin_on_gpu()
    # After a loss Ray begins anew as soon as it has ended the others, one of whom had the lock.
    lock = locked(directory, LOCK_WAIT_S if workers.size > 1 else 0.0) if workers.is_first else nullcontext()
    with refusals(directory), lock, voice(directory) if workers.is_first else Silence() as reporter:
        saved = workers.of_first(lambda: saved_run(directory, recipe))
        if workers.of_first((directory / FINISHED).is_file):
            if workers.is_first:  # where the last call was killed at its very end
                shutil.rmtree(directory / VALIDATED, ignore_errors=True)
            reporter.say(_nothing_to_do(directory))
            return directory
        with _reading():
            rows = load_rows(recipe, say=reporter.say)
        codec = workers.of_first(lambda: _prepare(directory, recipe, rows, saved, reporter))
        _check_same(workers, rows)
        if next(iter(codec.examples(rows["validation"])), None) is None:
            raise DataError(
                "no row of the validation split fits: each is empty, or longer than data.max_input_length or "
                "data.max_target_length; raise them"
            )
        codec = _with_grids(recipe, codec, rows, directory, reporter)
        examples = _encoded_by(workers, directory, codec, rows["train"])
        batches = _batches(recipe, codec, examples)
        _introduce(recipe, rows, codec, examples, batches, reporter)
        trainer = Trainer(
            recipe,
            directory,
            codec,
            batches,
            lambda model: objective_of(recipe, codec, model, rows["train"]),
            lambda candidate: _validate(recipe, codec, rows["validation"], candidate),
            _metric(recipe, codec),
            reporter,
            workers,
        )
        with termination_interrupts(workers.size == 1):
            best = trainer.run()
        if workers.is_first:
            _finish(recipe, trainer, best, len(examples))
        reporter.say(f"the best model, {_origin(trainer, best)}, is in {directory}; see its report.html")
    return directory


def _nothing_to_do(directory: Path) -> str:
    return f"{directory} is finished; nothing to do"


# Before step 0


@contextmanager
def _reading() -> Iterator[None]:
    """What the system cannot read is the data's fault, not the run directory's."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or 'the data'} cannot be read: {error.strerror or error}") from error


def _prepare(
    directory: Path, recipe: Recipe, rows: Mapping[str, Sequence[Row]], saved: RunFile | None, reporter: Reporter
) -> Codec:
    """Tokenizers and labels: trained and written, or read back and checked."""
    data = fingerprint(dict(rows))
    # What a run began from may have changed since; until it has trained, it may as well begin again.
    may_differ = saved is None or saved.data != data or recipe.init_from is not None
    if saved is None or (may_differ and not is_under_way(directory)):
        check_files(recipe.data)
        if recipe.init_from is None and (recipe.input == "text" or recipe.makes_text):
            reporter.say(f"training the {recipe.data.tokenizer.kind} tokenizer on {len(rows['train'])} rows")
        codec = Codec.train(recipe, rows["train"])
        check_memory(codec.config)  # first, so that the same directory serves a smaller model
        check_frozen(recipe, codec.config)
        _check_search(recipe, codec, rows["validation"][0])
        (directory / RUN).unlink(missing_ok=True)  # it names what stands here, so it goes before that changes
        keep_begin(_read_begin(recipe, codec, reporter), directory)
        keep_seen(rows["train"], directory, recipe.init_from)
        if found := rows_seen(rows["validation"], directory):
            reporter.say(
                f"warning: {len(found)} of the {len(rows['validation'])} inputs of the validation split are trained on "
                f"too, the first in row {found[0]}: its scores say nothing about new ones"
            )
        write_run(directory, recipe, codec, data)
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
    source, target = read_tokenizers(directory, saved)
    return Codec(saved.model, source, target, preprocessor_for(saved.model), recipe.data.max_target_length)


def _check_search(recipe: Recipe, codec: Codec, row: Row) -> None:
    """Raises ConfigError for what this model cannot be asked for, such as a word that it has no token for: before it is
    trained, since afterwards the recipe of the run may not change."""
    if recipe.generation == SearchParams():
        return
    model, tokenizers = new_model(codec.config).eval(), (codec.source_tokenizer, codec.target_tokenizer)
    untrained = Pretrained(model, codec.config, "", *tokenizers, codec.preprocessor, recipe.generation)
    try:
        Pipeline(untrained).prepare(row.item, truncate=True)
    except InputError as error:
        if error.param in SearchParams.model_fields:
            raise ConfigError(f"generation: {error}") from None


def _read_begin(recipe: Recipe, codec: Codec, reporter: Reporter) -> dict[str, Tensor]:
    """The weights that others have trained, by names of the model's."""
    weights = read_vectors(recipe.data, codec, reporter.say)
    if recipe.data.backbone_weights is not None:
        weights |= read_backbone(recipe.data.backbone_weights, codec.config)
        reporter.say(f"data.backbone_weights: the backbone begins with the weights of {recipe.data.backbone_weights}")
    return weights | frozen_weights(recipe, codec.config)


def _with_grids(
    recipe: Recipe, codec: Codec, rows: Mapping[str, Sequence[Row]], directory: Path, reporter: Reporter
) -> Codec:
    """Where the backbone does not learn, what it makes of each picture in place of the picture."""
    backbone = frozen_backbone(recipe, codec.config, directory)
    if backbone is None:
        return codec
    if recipe.data.augmentation is not None:
        raise ConfigError(
            "data.augmentation is set, but optim.freeze holds the whole backbone, whose features of each picture are "
            "computed once; remove the one, or let a part of the other learn"
        )
    began = time.monotonic()
    with reporter.counting("pictures") as told:
        codec = codec.with_grids(backbone, chain.from_iterable(rows.values()), told)
    assert codec.grids is not None
    seconds = time.monotonic() - began
    place = f"are in {file.parent}" if (file := codec.grids.file) else f"cannot be kept in {cache_directory()}"
    reporter.say(f"the backbone's features of {len(codec.grids)} pictures {place} ({seconds:.0f} s)")
    return codec


def _check_same(workers: Workers, rows: Mapping[str, Sequence[Row]]) -> None:
    """Each worker reads the data by itself, perhaps from another machine's disk. Raises DataError."""
    mine = fingerprint(dict(rows)) if workers.size > 1 else ""
    if mine != workers.of_first(lambda: mine):
        raise DataError(
            f"worker {workers.rank} reads other data than the first worker; give all machines the same files"
        )


def _encoded_by(workers: Workers, directory: Path, codec: Codec, rows: Sequence[Row]) -> Sequence[Example]:
    """The first worker writes the file, then the others read it; one that cannot see it encodes for itself."""
    examples = _encoded(directory, codec, rows) if workers.is_first else None
    source = workers.of_first(lambda: checkpoint.sha256(directory / RUN))
    if examples is None:
        examples = Encoded.load(directory / ENCODED, source)
    return codec.encode(rows) if examples is None else examples


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
        f"{recipe.task} on {recipe.data.origin}: {len(examples)} examples to train on, "
        f"{len(rows['validation'])} rows to validate; {len(batches)} batches an epoch, "
        f"{batches.padding_share:.1%} padding"
    )
    if warning := _overlap(recipe):
        reporter.say(warning)
    if left_out:
        reporter.say(f"{left_out} examples are left out, being longer than data.max_input_length or max_target_length")
    longest = codec.config.max_source_length
    if recipe.task == "classify" and (full := int((lengths_of(examples)[0] >= longest).sum())):
        reporter.say(f"{full} inputs fill data.max_input_length={longest}: of a longer one its beginning is read")
    if codec.config.labels and codec.config.problem_type != "regression":
        # In quotes where white space would hide that two are not the same.
        labels = [label if label.split() == [label] else repr(label) for label in codec.config.labels]
        reporter.say(f"{len(labels)} labels: {some(labels)}")
        unseen = {label for row in rows["validation"] for label in row.references} - set(codec.config.labels)
        if unseen:
            names = some(sorted(unseen))
            reporter.say(f"the training split lacks labels of the validation split, which can never be right: {names}")
    reporter.show_examples(examples[:NUM_EXAMPLES_SHOWN], codec)


def _overlap(recipe: Recipe) -> str | None:
    """A warning where what the run begins from may have been trained on rows that this one validates or tests on."""
    saved = readable_run(recipe.init_from) if recipe.init_from is not None else None
    if saved is None:
        return None
    theirs, ours = saved.recipe["data"], recipe.data.model_dump(mode="json")
    same = all(theirs.get(name) == ours[name] for name in ("id", "name", "path", "generated"))
    if not same or theirs.get("cut") == ours["cut"]:
        return None
    return (
        f"warning: {recipe.init_from} was trained on the same data with data.cut {theirs.get('cut')}, here it is "
        f"{ours['cut']}: it may know rows that are held out here; give both the same"
    )


def _batches(recipe: Recipe, codec: Codec, examples: Sequence[Example]) -> Batches:
    run, data = recipe.run, recipe.data
    if recipe.task == "generate":
        rows = min(run.rows_per_batch, max(1, run.tokens_per_batch // data.chunk_length))
        return Streams(examples, rows, data.chunk_length, run.seed, data.vary_chunk_length)
    sizes, wants_all = (run.tokens_per_batch, run.rows_per_batch), run.self_critical is not None
    return Buckets(examples, codec, *sizes, run.seed, wants_all, data.augmentation, data.tokenizer.dropout)


def _metric(recipe: Recipe, codec: Codec) -> str:
    """What decides which model is best. Raises ConfigError where it has no meaning for the labels."""
    has_spans = recipe.task == "tag" and is_bio(codec.config.labels)
    if (metric := recipe.metric(has_spans)) == "span_f1" and not has_spans:
        raise ConfigError("run.metric_for_best_model is 'span_f1', but labels are not BIO; use accuracy or nll")
    return metric


def _validate(recipe: Recipe, codec: Codec, rows: Sequence[Row], candidate: Path) -> dict[str, float]:
    result = score(candidate, _drawn(rows, recipe.run), codec, recipe.run.device)
    shown = {"samples": result.samples, "confusion": result.confusion, "kinds": result.kinds}
    (candidate / SHOWN).write_text(json.dumps(shown, ensure_ascii=False, indent=1), encoding="utf-8")
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
        "Data": recipe.data.origin,
        "Licence of the data": recipe.data.license,
        "Training examples": num_examples,
        "Parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "Steps": f"{trainer.progress.step}; the best model is {_origin(trainer, best)}",
        "Minutes": round(trainer.progress.seconds / 60, 1),
        "Steps skipped (loss or gradient not finite)": trainer.progress.skipped,
        **{f"Validation {name}": f"{value:.4f}" for name, value in scores.items()},
    }
    load_pretrained(best).save(directory, model_card(directory.name, recipe, facts))
    shown = json.loads((best / SHOWN).read_text(encoding="utf-8"))
    saved = read_run(directory)
    assert saved is not None
    facts |= provenance(directory, saved, recipe.run.device)
    text = (directory / RECIPE).read_text(encoding="utf-8")
    write_report(directory, f"Training {directory.name}", facts, text, **shown)
    (directory / ENCODED).unlink(missing_ok=True)
    for path in directory.iterdir():
        checkpoint.flush(path)  # before the file that says it is all there
    checkpoint.write_whole(
        directory / FINISHED, json.dumps({"step": trainer.progress.step, "validation": scores}) + "\n"
    )
    shutil.rmtree(directory / VALIDATED)


def _origin(trainer: Trainer, best: Path) -> str:
    if best != trainer.candidates.mean:
        return f"of step {trainer.progress.best_step}"
    return f"the mean of {len(trainer.progress.kept)} validated ones"
