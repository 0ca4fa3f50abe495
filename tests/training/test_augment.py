"""Pictures that change while they are trained on: by hand, and as a function of (seed, epoch, example)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqmodels.errors import ConfigError
from seqmodels.pretrained import load_pretrained
from tests.training.conftest import TrainUntil
from tests.training.recipes import DECODER, WORDS, recipe
from training.config import AugmentationSection
from training.data.augment import augmented
from training.data.batches import Buckets
from training.data.examples import Codec
from training.data.generated import generate
from training.run import train

PICTURE = torch.arange(3 * 8 * 6.0).view(3, 8, 6)
CAPTIONER = {
    "architecture": "generator",
    "encoder": {"input": "image", "backbone": {"image_size": [16, 16], "channels": [4, 8]}},
    "decoder": DECODER,
}


def drawn(seed: int, **how: float) -> torch.Tensor:
    return augmented(PICTURE, AugmentationSection(**how), np.random.default_rng(seed))


def test_left_and_right_change_places() -> None:
    assert torch.equal(drawn(1, mirror=1.0), PICTURE.flip(2))
    kinds = [bool(torch.equal(drawn(seed, mirror=0.25), PICTURE)) for seed in range(200)]
    assert 0.65 < sum(kinds) / 200 < 0.85 and all(
        same or torch.equal(drawn(seed, mirror=0.25), PICTURE.flip(2)) for seed, same in enumerate(kinds)
    )


def test_a_part_is_shown_as_large_as_the_whole() -> None:
    """Of a picture whose numbers are its places: how far they reach tells which part it is."""
    areas, corners = [], set()
    for seed in range(300):
        part = drawn(seed, least_area=0.25)
        assert part.shape == PICTURE.shape and float(part.min()) >= 0 and float(part.max()) <= float(PICTURE.max())
        columns, rows = part[0, 0, -1] - part[0, 0, 0], (part[0, -1, 0] - part[0, 0, 0]) / 6
        areas.append(float((columns + 1) * (rows + 1)) / 48)
        corners.add((round(float(part[0, 0, 0]) / 6), round(float(part[0, 0, 0]) % 6)))
    assert 0.15 < min(areas) < 0.35 and max(areas) > 0.9 and len(corners) > 10


def test_draws_are_a_function_of_seed_epoch_and_example() -> None:
    rows = generate("captions")["train"][:40]
    codec = Codec.train(recipe("caption", data={"generated": "captions", "tokenizer": WORDS}, model=CAPTIONER), rows)
    how = AugmentationSection(least_area=0.3, mirror=0.5)

    def pictures(seed: int, epoch: int) -> dict[int, torch.Tensor]:
        made = Buckets(codec.encode(rows), codec, 1000, 8, seed, augmentation=how)
        batches = [(made.epoch(epoch).batches[index], made.batch(epoch, index)["inputs"]) for index in range(len(made))]
        return {row: one for numbers, inputs in batches for row, one in zip(numbers, inputs, strict=True)}

    first = pictures(1, 0)
    assert all(torch.equal(first[row], other) for row, other in pictures(1, 0).items())
    for other in (pictures(1, 1), pictures(2, 0)):
        assert sum(torch.equal(first[row], other[row]) for row in first) < 5


def test_a_run_that_was_stopped_goes_on_with_the_same_pictures(tmp_path: Path, train_until: TrainUntil) -> None:
    def of(name: str, **data: Any) -> Any:
        sections = {"generated": "captions", "tokenizer": WORDS, **data}
        run = {"max_steps": 5, "save_steps": 2, "rows_per_batch": 8, "max_eval_samples": 4}
        return recipe("caption", tmp_path / name, data=sections, model=CAPTIONER, run=run)

    how = {"augmentation": {"least_area": 0.5, "mirror": 0.5}}
    train(of("whole", **how))
    train_until(of("stopped", **how), 3)
    train(of("stopped", **how))
    train(of("plain"))
    whole, stopped, plain = (load_pretrained(tmp_path / name).revision for name in ("whole", "stopped", "plain"))
    assert whole == stopped != plain


def test_where_it_would_do_nothing_it_is_refused(tmp_path: Path) -> None:
    how = {"augmentation": {"mirror": 0.5}}
    with pytest.raises(ConfigError, match=r"data\.augmentation is of pictures, but the model reads text"):
        recipe(data={"generated": "sentiment", **how})
    with pytest.raises(ConfigError, match=r"data\.augmentation changes nothing"):
        recipe("caption", data={"generated": "captions", "augmentation": {}}, model=CAPTIONER)
    run = {"max_steps": 1, "max_eval_samples": 4}
    train(recipe("caption", tmp_path / "first", data={"generated": "captions"}, model=CAPTIONER, run=run))
    frozen = recipe(
        "caption",
        tmp_path / "second",
        data={"generated": "captions", **how},
        model={"init_from": str(tmp_path / "first")},
        optim={"freeze": ["encoder.backbone.*"]},
        run=run,
    )
    with pytest.raises(ConfigError, match=r"data\.augmentation is set, but optim\.freeze holds the whole backbone"):
        train(frozen)
