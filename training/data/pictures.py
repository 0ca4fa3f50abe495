"""Picture files -> tensors, each decoded once as long as memory allows."""

from functools import lru_cache
from typing import Any

from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.preprocessing import Preprocessor

CACHE_BYTES = 2**28  # of decoded pictures


def preprocessor_for(config: ModelConfig) -> Preprocessor | None:
    """What a model's pictures go through, None where it reads none."""
    if config.encoder is None or config.encoder.input not in ("image", "frames"):
        return None
    backbone = config.encoder.backbone
    return Preprocessor(size=backbone.image_size, channels=backbone.in_channels)


def decode(preprocessor: Preprocessor, data: bytes) -> Tensor:
    """A picture's file -> (C, H, W). Raises InputError."""
    picture: Tensor = _decoder(preprocessor)(data)
    return picture


@lru_cache(maxsize=8)
def _decoder(preprocessor: Preprocessor) -> Any:
    size = 4 * preprocessor.channels * preprocessor.size[0] * preprocessor.size[1]
    return lru_cache(maxsize=CACHE_BYTES // size)(preprocessor.image)
