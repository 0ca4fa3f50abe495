"""One model from several: the mean of their weights.

Models that one run passed through, or that were tuned from the same weights, lie close enough together for it (Izmailov
et al. 2018); those of other seeds do not: let these answer together instead, see `seqmodels.ensemble`.
"""

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.ensemble import load_members
from seqmodels.errors import ConfigError
from seqmodels.models import Model
from seqmodels.pretrained import RECIPE, Pretrained
from training.directory import FINISHED, RUN, readable_run
from training.parsing import differences
from training.seen import copy_seen

DIFFERENCES_SHOWN = 3
CARD = """# {name}

The mean of the weights of {members}. Nothing says yet how good it is: `python -m training evaluate {name}`.
"""


def average_directories(directories: Sequence[Path], output: Path) -> None:
    """Write the mean as a model directory, with tokenizers, search defaults and recipe of the first. Where all were
    trained on the same rows, its run.json too, which tells an evaluation what they were.

    Raises ModelDirectoryError, and ConfigError where the models differ in more than their weights or `output` is taken.
    """
    if len(directories) < 2:
        raise ConfigError("one model has no mean; give two or more model directories")
    if output.exists():
        raise ConfigError(f"--output is {output}, which exists; name a new directory")
    mean = averaged(directories)
    card = CARD.format(name=output.name, members=", ".join(directory.name for directory in directories))
    with _written_whole(output) as directory:
        mean.save(directory, card)
        if (directories[0] / RECIPE).is_file():
            shutil.copyfile(directories[0] / RECIPE, directory / RECIPE)
        if _have_same_rows(directories):
            shutil.copyfile(directories[0] / RUN, directory / RUN)
            copy_seen(directories[0], directory)
            # Without it the same recipe would be trained here, over the mean.
            made_of = {"average_of": [str(one) for one in directories]}
            (directory / FINISHED).write_text(json.dumps(made_of) + "\n", encoding="utf-8")


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A directory to write to that is there under its name at the end alone: no half of it stands in the way of the
    same command, given again after a full disk."""
    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    try:
        yield temporary
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _have_same_rows(directories: Sequence[Path]) -> bool:
    """Whether each tells what it was trained on, and all the same."""
    rows = {run and run.data for run in map(readable_run, directories)}
    return len(rows) == 1 and None not in rows


def averaged(directories: Sequence[Path]) -> Pretrained:
    """The first model directory, with the mean of all weights. Raises as above."""
    members = load_members(directories)
    configs = [member.config.model_copy(update={"temperature": 1.0}) for member in members]  # each fits its own weights
    for path, config in zip(directories, configs, strict=True):
        if config != configs[0]:
            unlike = differences(configs[0].model_dump(mode="json"), config.model_dump(mode="json"))
            told = [f"{key} is {was!r} and {now!r}" for key, was, now in islice(unlike, DIFFERENCES_SHOWN)]
            raise ConfigError(
                f"{directories[0]} and {path} differ in config.json ({', '.join(told)}), so their weights have no mean;"
                " give models of one config, such as the snapshots of one run"
            )
    model = mean_model([member.model for member in members])
    model.config = configs[0]
    return replace(members[0], model=model, config=configs[0])


def mean_model(models: Sequence[Model]) -> Model:
    """Their mean, summed in float64. Of running statistics too, which is near to what the mean would see; what counts,
    such as batches, is the first's."""
    weights = [model.state_dict() for model in models]
    mean = copy.deepcopy(models[0])
    mean.load_state_dict({name: _mean([one[name] for one in weights]) for name in weights[0]})
    return mean


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
