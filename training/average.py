"""One model from several: the mean of their weights.

Models that one run passed through, or that were tuned from the same weights, lie close enough together for it (Izmailov
et al. 2018); those of other seeds do not: let these answer together instead, see `seqmodels.ensemble`.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.ensemble import load_members
from seqmodels.errors import ConfigError
from seqmodels.models import Model
from seqmodels.pretrained import RECIPE, Pretrained

CARD = """# {name}

The mean of the weights of {members}. Nothing says yet how good it is: `python -m training evaluate {name}`.
"""


def average_directories(directories: Sequence[Path], output: Path) -> None:
    """Write the mean as a model directory, with tokenizers, search defaults and recipe of the first.

    Raises ModelDirectoryError, and ConfigError where the models differ in more than their weights or `output` is taken.
    """
    if len(directories) < 2:
        raise ConfigError("one model has no mean; give two or more model directories")
    if output.exists():
        raise ConfigError(f"--output is {output}, which exists; name a new directory")
    mean = averaged(directories)
    card = CARD.format(name=output.name, members=", ".join(directory.name for directory in directories))
    mean.save(output, card)
    if (directories[0] / RECIPE).is_file():
        shutil.copyfile(directories[0] / RECIPE, output / RECIPE)


def averaged(directories: Sequence[Path]) -> Pretrained:
    """The first model directory, with the mean of all weights. Raises as above."""
    members = load_members(directories)
    configs = [member.config.model_copy(update={"temperature": 1.0}) for member in members]  # each fits its own weights
    for path, config in zip(directories, configs, strict=True):
        if config != configs[0]:
            raise ConfigError(f"{directories[0]} and {path} differ in config.json, so their weights have no mean")
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
