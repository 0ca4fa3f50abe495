"""Picture files -> tensors, each decoded once as long as memory allows."""

from functools import lru_cache
from typing import Any

from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.preprocessing import Preprocessor

CACHE_BYTES = 2**28  # of decoded pictures
# What published weights were trained on: means and deviations of values from 0 to 1.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMS = {"mobilenet_v2": ((128 / 255,), (128 / 255,))}  # from 0 to 255, x / 128 - 1


def preprocessor_for(config: ModelConfig) -> Preprocessor | None:
    """What a model's pictures go through, None where it reads none."""
    if config.encoder is None or config.encoder.input not in ("image", "frames"):
        return None
    backbone = config.encoder.backbone
    mean, std = NORMS.get(backbone.kind, ((0.5,), (0.5,)) if backbone.kind == "compact" else IMAGENET)
    return Preprocessor(size=backbone.image_size, channels=backbone.in_channels, mean=mean, std=std)


def decode(preprocessor: Preprocessor, data: bytes) -> Tensor:
    """A picture's file -> (C, H, W). Raises InputError."""
    picture: Tensor = _decoder(preprocessor)(data)
    return picture


@lru_cache(maxsize=8)
def _decoder(preprocessor: Preprocessor) -> Any:
    size = 4 * preprocessor.channels * preprocessor.size[0] * preprocessor.size[1]
    return lru_cache(maxsize=CACHE_BYTES // size)(preprocessor.image)
