"""python -m training train RECIPE.yaml [key=value ...] · evaluate MODEL_DIR [--split test] [key=value ...] · average
MODEL_DIR ... --output NEW_DIR · calibrate MODEL_DIR · shortlist MODEL_DIR · distill MODEL_DIR --output FOLDER · tune
RECIPE.yaml SPACE.yaml"""

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from seqmodels.clips import is_directory
from seqmodels.config import Average, ModelConfig, Weights, explain
from seqmodels.errors import CheckpointError, ConfigError, SeqModelsError
from seqmodels.yaml_files import read_yaml
from training.config import Recipe
from training.parsing import differences, load_recipe
from training.screen import reader_has_left

if TYPE_CHECKING:
    from training.adaptive import Adaptation

TRAIN_HELP = """\
examples:
  python -m training train recipes/demo/sentiment.yaml
  python -m training train recipes/sst2.yaml data.path=../shared/data/sst2 run.seed=2
  python -m training train recipes/multi30k-en-de.yaml optim.learning_rate=5e-4 run.output_dir=models/second-try

Every key of the recipe can be set on the command line. Interrupted runs go on where they stopped when the same
command is given again, or end at once with their best model when run.max_minutes=0.1 is added; a finished run is left
as it is.
"""
EVALUATE_HELP = """\
examples:
  python -m training evaluate models/sentiment --baseline
  python -m training evaluate models/multi30k-en-de --split test generation.num_beams=5 run.device=cuda
  python -m training evaluate models/seed-1 models/seed-2 models/seed-3
  python -m training evaluate models/sentiment data.path=new.csv data.splits.test=train

The last scores other data: all of a file is its split train. Several models answer as one, with the recipe and the
search of the first.

The last line of the output is JSON; with the samples that stand above it, it is also written to evaluation-SPLIT.json
in the model directory; with int8, another search, other data or several models to evaluation-SPLIT-int8.json,
-num_beams=1.json, -new.csv-DIGEST.json, -ensemble-REVISION.json or the like, in the directory of the first of them.
"""
SHORTLIST_HELP = """\
A step of the search then looks at a few hundred target tokens in place of the whole vocabulary: those that the source's
tokens were translated into in the training split, and the most frequent ones. Measure what it costs before use:

  python -m training shortlist models/multi30k-en-de
  python -m training evaluate models/multi30k-en-de --split validation --shortlist
  python -m seqmodels generate models/multi30k-en-de --shortlist sentences.txt
"""
AVERAGE_HELP = """\
For models that one run passed through, or that were tuned from one: the snapshots of a cyclic schedule, say. Those of
other seeds have no useful mean; let them answer together, as several directories of `evaluate`, `python -m seqmodels`
or a service.

  python -m training average models/run/snapshots/cycle-4 models/run/snapshots/cycle-5 --output models/mean
  python -m training evaluate models/mean --split validation
"""
CALIBRATE_HELP = """\
A classifier or tagger that is sure of itself too often, or not often enough, is put right by one number, fitted on the
validation split and kept in config.json. Which label is the likeliest does not change; probabilities and nll do.

  python -m training calibrate models/sst2
"""
DISTILL_HELP = """\
A small model learns more from what a large one writes than from what people wrote (Kim and Rush 2016). The folder is a
data set like that of the teacher's recipe; its README.md says how to train on it. When interrupted, give the same
command again: it goes on where it stopped.

  python -m training distill models/multi30k-en-de --output data/distilled
  python -m training distill models/seed-1 models/seed-2 --output data/distilled generation.num_beams=8
  python -m training train recipes/multi30k-en-de.yaml data.path=data/distilled run.output_dir=models/student
"""
ADAPTATION_HELP = {
    "dynamic_rate": "dynamic evaluation: the rate of learning, such as 0.002 for words, 0.00005 for characters",
    "dynamic_decay": "how far each step of it is followed by a step back, such as 0.02",
    "cache_weight": "a cache of words of late: its share of a word's probability, such as 0.1",
    "cache_size": "of how many words (default: 500)",
    "cache_flatness": "how much a likeness of states counts (default: 0.3)",
}
TUNE_HELP = """\
SPACE.yaml holds keys of the recipe and what to draw their values from, bounds included:

  optim.learning_rate: {log_uniform: [1e-4, 1e-2]}
  model.dropout: {uniform: [0, 0.5]}
  model.encoder.recurrent.hidden_size: {integers: [32, 128]}
  model.encoder.recurrent.cell: {choice: [gru, lstm]}

  python -m training tune recipes/demo/sentiment.yaml space.yaml --trials 20 run.output_dir=models/search

Each trial is an ordinary run, in trial-000, trial-001 ... of run.output_dir; the same seed draws the same values. Of
the trials that come to their 1st, 3rd, 9th ... validation the best third goes on (ASHA). The best one's model directory
is kept, of the others the scores. The same command goes on where a search was interrupted; a larger --trials adds more.
"""
EVALUATION_KEYS = (
    *("data.id", "data.name", "data.revision", "data.path", "data.generated", "data.columns", "data.splits"),
    *("data.cut", "data.label_names", "data.max_target_length", "run.device", "run.threads"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about what is wrong."""
    # oneDNN, below torch, keeps what it made for the last 1,024 shapes: 5 GB in a small model's run in bfloat16. Making
    # more of them anew costs nothing that could be measured.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    options = _options(arguments)
    try:
        options.run(options)
    except SeqModelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():
            return 0
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.run in (_train, _tune, _distill)
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(f"interrupted{'; the same command goes on where it stopped' if goes_on else ''}", file=sys.stderr)
        return 130
    return 0


def _in_words(error: OSError) -> str:
    """A write that fails, unlike an open, does not say of which file."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}the disk is full; make room and give the command again"
    if error.errno == errno.EDQUOT:
        return f"{where}your share of the disk is used up; make room and give the command again"
    return f"{where or 'a file cannot be read or written: '}{error.strerror or error}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. argparse takes the overrides up to the first option; those that stand after it come here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest and "overrides" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="From data to a model directory.")
    commands = parser.add_subparsers(required=True, metavar="command")
    raw = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser("train", help="train a recipe", epilog=TRAIN_HELP, formatter_class=raw)
    train.add_argument("recipe", type=Path, help="a YAML file, see recipes/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before the recipe's")
    train.set_defaults(run=_train)
    score = commands.add_parser("evaluate", help="score a model", epilog=EVALUATE_HELP, formatter_class=raw)
    score.add_argument("directory", type=Path, metavar="MODEL_DIR", help="a finished run")
    score.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL_DIR | key=value",
        help="further runs, which answer with the first as one; settings that go before those of its recipe",
    )
    score.add_argument(
        "--average",
        choices=get_args(Average),
        help="of what several models predict: their probabilities (default), or their log-probabilities",
    )
    score.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    score.add_argument("--baseline", action="store_true", help="also score a baseline that cannot see order or motion")
    score.add_argument("--decoder-weights", default="float32", choices=get_args(Weights), help="default: float32")
    score.add_argument(
        "--shortlist", action="store_true", help="search with the model's shortlist; nll stays over all tokens"
    )
    adaptive = score.add_argument_group("a language model that goes on learning from the text it is scored on")
    for name, text in ADAPTATION_HELP.items():
        adaptive.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)
    score.set_defaults(run=_evaluate)
    mean = commands.add_parser(
        "average",
        help="make one model of several, with the mean of their weights",
        epilog=AVERAGE_HELP,
        formatter_class=raw,
    )
    mean.add_argument("directories", type=Path, nargs="+", metavar="MODEL_DIR", help="two or more, of one config")
    mean.add_argument("--output", type=Path, required=True, metavar="NEW_DIR", help="where the mean is written")
    mean.set_defaults(run=_average)
    warm = commands.add_parser(
        "calibrate",
        help="make a classifier's or tagger's probabilities mean what they say",
        epilog=CALIBRATE_HELP,
        formatter_class=raw,
    )
    warm.add_argument("directory", type=Path, metavar="MODEL_DIR", help="a finished run")
    warm.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before those of its recipe")
    warm.set_defaults(run=_calibrate)
    shorten = commands.add_parser(
        "shortlist", help="learn a shortlist for a translator", epilog=SHORTLIST_HELP, formatter_class=raw
    )
    shorten.add_argument("directory", type=Path, metavar="MODEL_DIR", help="a finished run")
    shorten.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that go before those of its recipe"
    )
    shorten.add_argument("--translations", type=int, default=50, help="of each source token (default: %(default)s)")
    shorten.add_argument("--frequent", type=int, default=100, help="on every list (default: %(default)s)")
    shorten.set_defaults(run=_shortlist)
    tune = commands.add_parser("tune", help="search a recipe's settings", epilog=TUNE_HELP, formatter_class=raw)
    tune.add_argument("recipe", type=Path, help="a YAML file, see recipes/")
    tune.add_argument("space", type=Path, help="a YAML file, see below")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before the recipe's")
    tune.add_argument("--trials", type=int, default=10, help="how many to run (default: %(default)s)")
    tune.add_argument("--at-once", type=int, help="how many at a time (default: as many as there are cores)")
    tune.add_argument("--seed", type=int, default=1, help="of what is drawn (default: %(default)s)")
    tune.add_argument(
        "--min-validations", type=int, default=1, help="before a trial may be stopped (default: %(default)s)"
    )
    tune.set_defaults(run=_tune)
    teach = commands.add_parser(
        "distill",
        help="let translators write the targets that a smaller one learns from",
        epilog=DISTILL_HELP,
        formatter_class=raw,
    )
    teach.add_argument("directory", type=Path, metavar="MODEL_DIR", help="the teacher, a finished run")
    teach.add_argument("overrides", nargs="*", metavar="MODEL_DIR | key=value", help="as for evaluate")
    teach.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the data set is written")
    teach.add_argument("--average", choices=get_args(Average), help="as for evaluate")
    teach.set_defaults(run=_distill)
    return parser


def _train(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)  # fails in the first second, before torch is imported
    from training.run import train

    train(recipe)


def _evaluate(options: argparse.Namespace) -> None:
    others, overrides, average = _members(options)
    recipe, params = _recipe_of(options.directory, overrides)
    from training import checkpoint
    from training.evaluate import evaluate

    loading = {"decoder_weights": options.decoder_weights, "shortlist": options.shortlist}
    result, name = evaluate(
        options.directory,
        recipe,
        options.split,
        params,
        options.baseline,
        loading,
        others,
        average,
        _adaptation(options),
    )
    fault = None
    try:  # first, for whoever reads what is printed may leave
        checkpoint.write_whole(options.directory / name, json.dumps(result, indent=1) + "\n")
    except OSError as error:  # such as of a disk that may only be read
        fault = error.strerror or error
    for score, value in result["scores"].items():
        print(f"{score:>24}  {value:.4f}  {result['signatures'].get(score, '')}".rstrip())
    for sample in result["samples"]:
        print("\n" + "\n".join(f"{what:>24}  {text}" for what, text in sample.items()))
    print(json.dumps({what: value for what, value in result.items() if what != "samples"}))
    if fault:
        raise CheckpointError(f"the scores above hold, but {options.directory / name} could not be written: {fault}")


def _members(options: argparse.Namespace) -> tuple[list[Path], list[str], Average]:
    """The models that answer with the first as one, the overrides that stand among them, and what is averaged."""
    others = [Path(text) for text in options.overrides if "=" not in text or is_directory(text)]
    if absent := [path for path in others if not is_directory(str(path))]:
        raise ConfigError(
            f"{str(absent[0])!r} is no directory; name one that holds a model, or write a setting as key=value, such "
            "as run.seed=2"
        )
    if options.average and not others:
        raise ConfigError(f"--average is {options.average!r}, but one model has nothing to average; leave it out")
    overrides = [text for text in options.overrides if Path(text) not in others]
    return others, overrides, options.average or "probability"


def _adaptation(options: argparse.Namespace) -> "Adaptation":
    from training.adaptive import Adaptation

    given = {name: getattr(options, name) for name in ADAPTATION_HELP if getattr(options, name) is not None}
    if given.get("cache_size", 0.5).is_integer():
        given["cache_size"] = int(given["cache_size"])
    try:
        return Adaptation(**given)
    except ValidationError as error:
        raise ConfigError(f"--{explain(error).replace('_', '-', 1)}") from None


def _average(options: argparse.Namespace) -> None:
    from training.average import average_directories

    average_directories(options.directories, options.output)
    calibrated = any(ModelConfig.load(path / "config.json").temperature != 1.0 for path in options.directories)
    again = "; they were calibrated, each for itself, and the mean is not: calibrate it" if calibrated else ""
    print(f"wrote {options.output}, the mean of {len(options.directories)} models{again}")


def _calibrate(options: argparse.Namespace) -> None:
    recipe, _ = _recipe_of(options.directory, options.overrides)
    from training.calibrate import calibrate

    done = calibrate(options.directory, recipe)
    print(f"temperature {done.temperature:.4f}, in {options.directory / 'config.json'}")
    for name, (before, after) in (("nll", done.nll), ("calibration error", done.error)):
        print(f"validation {name} {before:.4f} before, {after:.4f} with it")


def _shortlist(options: argparse.Namespace) -> None:
    recipe, _ = _recipe_of(options.directory, options.overrides)
    from training.shortlist import add_shortlist

    for name in ("translations", "frequent"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    print(f"wrote {add_shortlist(options.directory, recipe, options.translations, options.frequent)}")


def _tune(options: argparse.Namespace) -> None:
    from training.search import search

    search(
        options.recipe,
        options.space,
        options.overrides,
        count=options.trials,
        seed=options.seed,
        at_once=options.at_once,
        min_validations=options.min_validations,
    )


def _distill(options: argparse.Namespace) -> None:
    others, overrides, average = _members(options)
    recipe, params = _recipe_of(options.directory, overrides)
    from training.distill import distill

    distill([options.directory, *others], recipe, options.output, params, average)


def _recipe_of(directory: Path, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """The run's recipe with overrides, and the search parameters that these change; sets `run.threads`."""
    path = directory / "recipe.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{directory} holds no recipe.yaml; give the directory of a run of `python -m training train`"
        )
    own = _own_model(path)
    before, now = (load_recipe(path, [*own, *given]) for given in ((), overrides))
    params: dict[str, Any] = {}
    if now.task != "generate":  # by name, not by difference: the directory's own defaults may have been edited since
        given = {override.partition("=")[0] for override in overrides}
        options = now.generation.model_dump(mode="json").items()
        params = {name: value for name, value in options if f"generation.{name}" in given}
    for key, _, value in differences(before.model_dump(mode="json"), now.model_dump(mode="json")):
        section, _, name = key.partition(".")
        if section == "generation" and now.task != "generate":
            params[name] = value
        elif not any(f"{key}.".startswith(f"{known}.") for known in EVALUATION_KEYS):
            raise ConfigError(
                f"{key} changes nothing in an evaluation; remove it (what can be set: {', '.join(EVALUATION_KEYS)}, "
                "and generation.* where a text is generated)"
            )
    if now.run.threads:
        import torch

        torch.set_num_threads(now.run.threads)
    return now, params


def _own_model(path: Path) -> list[str]:
    """What a finished model began from may be gone, or be another now; its own directory says all that it said."""
    fields = read_yaml(path, "recipe")
    begun = isinstance(fields, dict) and isinstance(fields.get("model"), dict) and "init_from" in fields["model"]
    begun = begun and (path.parent / "config.json").is_file()  # else it is not finished
    return [f"model.init_from={json.dumps(str(path.parent))}"] if begun else []


if __name__ == "__main__":
    sys.exit(main())
