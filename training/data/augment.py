"""Pictures shown a little differently each time that they are trained on."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from training.config import AugmentationSection


def augmented(picture: Tensor, how: AugmentationSection, random: np.random.Generator) -> Tensor:
    """A part of a picture (C, H, W), of the same proportions and perhaps mirrored, scaled to its size."""
    height, width = picture.shape[1:]
    share = random.uniform(how.least_area, 1.0) ** 0.5  # of each side
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    part = picture[:, top : top + rows, left : left + columns]
    if random.random() < how.mirror:
        part = part.flip(2)
    scaled: Tensor = F.interpolate(part[None], (height, width), mode="bilinear", antialias=True)[0]
    return scaled
