"""Published weights of a backbone, `data.backbone_weights`: a safetensors file, or one of the hub.

Names and shapes must be the backbone's own, to the last one; only the layer that tells ImageNet's classes apart is left
out. Numbers may be of 16 bits; they are trained on in 32.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.config import ModelConfig, PublishedBackboneConfig
from seqmodels.errors import ConfigError, ModelDirectoryError
from seqmodels.pretrained import read_weights
from seqmodels.vision import build_backbone

CLASSIFIERS = ("fc.", "classifier.")  # ImageNet's
PICKLES = (".pt", ".pth", ".bin", ".pkl")
ON_HUB = "model.safetensors"  # as timm names it


def backbone_file(source: str) -> Path:
    """Where the weights lie: the file of that name, or what the hub has under it, which is fetched once.

    Raises ConfigError where there is neither.
    """
    if Path(source).is_file():
        return Path(source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    field = f"data.backbone_weights is {source!r}"
    try:
        return Path(hf_hub_download(source, ON_HUB))
    except HFValidationError:
        raise ConfigError(f"{field}, which is no file; name a safetensors file, or a model of the hub") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{field}, which is no file here, and the hub cannot be reached; name a safetensors file"
        ) from None
    except (HfHubHTTPError, OSError):
        raise ConfigError(
            f"{field}, which is no file here, and the hub has no {ON_HUB} under that name; name a safetensors file"
        ) from None


def read_backbone(source: str, config: ModelConfig) -> dict[str, Tensor]:
    """By their names in the whole model, on which they are checked. Raises ConfigError."""
    backbone = getattr(config.encoder, "backbone", None)
    assert isinstance(backbone, PublishedBackboneConfig), "a recipe with another is refused"
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build_backbone(backbone).state_dict().items()}
    try:
        file = backbone_file(source)
        if file.suffix in PICKLES:
            raise ModelDirectoryError("a pickle can run any code and is not read; save its tensors as safetensors")
        found = read_weights(file)
    except ModelDirectoryError as error:
        raise ConfigError(f"data.backbone_weights {source}: {error}") from None
    weights = {name: tensor for name, tensor in found.items() if not name.startswith(CLASSIFIERS)}
    for name in expected.keys() - weights.keys():  # of batches seen, which nothing here uses and some files lack
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
    _check(weights, expected, f"data.backbone_weights {source}", backbone.kind)
    return {
        f"encoder.backbone.{name}": tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], field: str, kind: str) -> None:
    if missing := sorted(expected.keys() - weights.keys()):
        raise ConfigError(f"{field} lacks {missing[0]!r}, which {kind} has; name weights of that backbone")
    if extra := sorted(weights.keys() - expected.keys()):
        raise ConfigError(f"{field} holds {extra[0]!r}, which {kind} has not; name weights of that backbone")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ConfigError(
                f"{field}: {name!r} has shape {tuple(weights[name].shape)}, but in {kind} {tuple(shape)}; name weights "
                "of that backbone"
            )
        if not weights[name].isfinite().all():
            raise ConfigError(f"{field}: {name!r} holds NaN or infinity; fetch the file again")
