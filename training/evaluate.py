"""Score a finished model on one split of its data, or of other data: `python -m training evaluate`."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from seqmodels.config import Average, PublishedBackboneConfig
from seqmodels.encoders import FrameEncoder, ImageEncoder
from seqmodels.ensemble import common_reader, load_members, revision_of
from seqmodels.errors import ConfigError, DataError
from seqmodels.models import Model
from training import baselines
from training.adaptive import Adaptation
from training.config import DataSection, Recipe
from training.data.examples import Codec
from training.data.rows import Row, fingerprint
from training.data.sources import Splits
from training.directory import RUN, readable_run
from training.parsing import differences
from training.reporter import counting
from training.scoring import NO_ADAPTATION, applicable, score
from training.screen import screen
from training.seen import refuse_seen

LONGEST_NAME = 150  # characters of what tells one file of scores from another


def evaluate(
    directory: Path,
    recipe: Recipe,
    split: str,
    params: Mapping[str, Any],
    with_baseline: bool = False,
    loading: Mapping[str, Any] = MappingProxyType({}),
    others: Sequence[Path] = (),
    average: Average = "probability",
    adaptation: Adaptation = NO_ADAPTATION,
) -> tuple[dict[str, Any], str]:
    """Score a finished model on one split of its data, or of other data. Returns the result, and the name of a file for
    it: `evaluation-test.json`, and for each other way of loading, search or data one of its own, such as
    `evaluation-test-int8-shortlist.json` or `evaluation-test-num_beams=1.json`.

    loading: see `scoring.score`. others: models that answer with it as one, by the average of what all predict. Raises
    DataError for a split that is cut from other data than the run's: what was trained on could be in it; ConfigError
    for a loading option that changes nothing, and for models that do not fit together.
    """
    if with_baseline:
        _baseline(recipe)  # first: to find out that there is none should not take long
    directories = [directory, *others]
    members = load_members(directories)
    saved = common_reader(members)
    loading = applicable(saved.config, loading)  # before the data, which may take a while
    codec = Codec.of(saved, recipe.data)
    with_train = with_baseline or adaptation.dynamic_rate > 0
    rows, *_ = [rows_to_score(member, recipe, split, with_train) for member in directories]  # each checks its own
    if len(members) == 1:
        codec = _with_grids(codec, members[0].model, rows[split], recipe.run.device)
    result = score(
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
        name, baseline = _baseline(recipe)
        scores[name] = baseline(rows["train"], rows[split])
    report = {
        "model": " ".join(member.name for member in directories),
        "revision": revision_of(members, average),
        "data": recipe.data.origin,
        "split": split,
        "rows": result.num_rows,
        "scores": scores,
        "signatures": result.signatures,
        "search": {**saved.generation.model_dump(mode="json", exclude_defaults=True), **params},
        "loading": loading,
        "samples": result.samples,
    }
    ways = [name if value is True else str(value) for name, value in loading.items() if value not in ("float32", False)]
    usual = saved.generation.model_dump(mode="json")
    ways += [f"{name}={_word(value)}" for name, value in sorted(params.items()) if value != usual[name]]
    ways += _other_data(directory, recipe.data)
    if adaptation.ways:
        report["adaptation"] = adaptation.model_dump(exclude_defaults=True)
        ways += adaptation.ways
    if others:
        report["average"] = average
        ways.append(f"ensemble-{report['revision']}")
    if sum(map(len, ways)) > LONGEST_NAME:
        ways = [_digest(ways)]
    return report, "-".join(["evaluation", split, *ways]) + ".json"


def _same_source(one: DataSection, other: DataSection) -> bool:
    """A path may be spelt in several ways."""
    if one.path is not None and other.path is not None:
        return Path(one.path).resolve() == Path(other.path).resolve()
    return one.origin == other.origin


def _other_data(directory: Path, data: DataSection) -> list[str]:
    """What tells a file of scores on this data from that of the run's own: one name, or none."""
    if (run := readable_run(directory)) is None:
        return []
    theirs, ours = (
        {**section.model_dump(mode="json"), "path": section.path and str(Path(section.path).resolve())}
        for section in (run.data_section, data)
    )
    changed = {key: now for key, _, now in differences(theirs, ours)}
    return [f"{_word(Path(data.origin).name)}-{_digest(changed)}"] if changed else []


def _word(value: Any) -> str:
    """A value as part of the name of a file."""
    return str(value) if re.fullmatch(r"[\w.+-]{1,40}", str(value)) else _digest(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _with_grids(codec: Codec, model: Model, rows: Sequence[Row], device: str) -> Codec:
    """Features of pictures that come from a published backbone take most of the time, and are the same for each search
    that is tried on a split. They keep all their bits, so that what is scored is what is served."""
    backbone = getattr(codec.config.encoder, "backbone", None)
    if not isinstance(backbone, PublishedBackboneConfig):
        return codec
    assert isinstance(model.encoder, ImageEncoder | FrameEncoder)
    with counting("pictures", screen()) as told:
        return codec.with_grids(model.encoder.backbone.to(device), rows, told, torch.float32)


def rows_to_score(directory: Path, recipe: Recipe, split: str, with_train: bool = False) -> dict[str, list[Row]]:
    """The split, and train where something else is learned from it. Raises DataError where the split is cut from other
    data than the directory's model was trained on, which may have seen its rows, and where it shows pictures that it
    has seen."""
    rows = _rows(directory, recipe, split, with_train)
    if split != "train":
        refuse_seen(rows[split], split, directory, print)
    return rows


def _rows(directory: Path, recipe: Recipe, split: str, with_train: bool) -> dict[str, list[Row]]:
    splits, run = Splits(recipe), readable_run(directory)
    wanted = {split, "train"} if with_train else {split}
    if run is None:
        print(f"{directory} holds no {RUN} of this version, so nothing tells whether the {split} split was trained on")
        return splits.rows(sorted(wanted), print)
    theirs = run.data_section
    name = getattr(recipe.data.splits, split)
    if not _same_source(recipe.data, theirs):
        print(f"scoring on {recipe.data.origin}; the model was trained on {theirs.origin}")
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


def _baseline(recipe: Recipe) -> tuple[str, Callable[[Sequence[Row], Sequence[Row]], float]]:
    """Its name, and what scores it, of rows to train on and rows to score. Raises ConfigError where there is none."""
    match recipe.task, recipe.input, recipe.problem_type:
        case "classify", "text", "single_label_classification":
            return "bag_of_words_baseline", baselines.bag_of_words
        case ("tag", "frames", _) | ("classify", "frames", "single_label_classification"):
            return "single_frame_baseline", baselines.single_frame
    what = f"task {recipe.task}" if recipe.task != "classify" else recipe.problem_type
    raise ConfigError(f"there is no baseline for {what} on {recipe.input}; leave out --baseline")
