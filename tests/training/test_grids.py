"""Grids in place of pictures: what a backbone makes, kept on the disk, and a run that reads them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seqmodels.config import BackboneConfig
from seqmodels.errors import InputError
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import load_pretrained
from seqmodels.vision import Backbone, build_backbone
from tests.training.conftest import TrainUntil
from tests.training.recipes import recipe
from training.data.grids import PICTURES_PER_CALL, Grids, grids_of
from training.initial import frozen_backbone, frozen_weights, keep_begin
from training.run import train

CONFIG = BackboneConfig(image_size=(8, 8), channels=(4, 6))
PREPROCESSOR = Preprocessor(size=(8, 8))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (number * 5 % 256, 7 * number % 256, number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone(CONFIG).eval()


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def test_each_picture_has_what_the_backbone_makes_of_it(backbone: Backbone) -> None:
    pictures = [picture(number) for number in range(PICTURES_PER_CALL + 3)]
    told = Told()
    grids = grids_of([*pictures, pictures[0]], backbone, PREPROCESSOR, None, told)
    assert len(grids) == len(pictures) and told.calls == [(32, 35), (35, 35)]
    for data in pictures:
        with torch.no_grad():
            expected = backbone(PREPROCESSOR.image(data)[None])[0]
        found = grids.get(data)
        assert found is not None and found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert grids.get(picture(99)) is None


def test_they_are_made_once_for_the_same_pictures_weights_and_preprocessing(backbone: Backbone, tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(5)]

    def made(*pictures: bytes, with_backbone: Backbone = backbone, preprocessor: Preprocessor = PREPROCESSOR) -> bool:
        told = Told()
        grids = grids_of(pictures, with_backbone, preprocessor, tmp_path / "cache", told)
        expected = grids_of(pictures, with_backbone, preprocessor, None, Told())
        assert all(torch.equal(grids.get(data), expected.get(data)) for data in pictures)  # type: ignore[arg-type]
        return bool(told.calls)

    assert made(*pictures) and not made(*pictures) and not made(*reversed(pictures))
    assert made(*pictures[:4])
    assert made(*pictures, with_backbone=build_backbone(CONFIG).eval())
    assert made(*pictures, preprocessor=Preprocessor(size=(8, 8), mean=(0.4,)))
    assert not made(*pictures, preprocessor=Preprocessor(size=(8, 8), max_pixels=100))  # a bound changes no feature
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda _: b""]
)
def test_a_damaged_file_is_made_anew(backbone: Backbone, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    grids_of([picture(1)], backbone, PREPROCESSOR, tmp_path, Told())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    told = Told()
    assert grids_of([picture(1)], backbone, PREPROCESSOR, tmp_path, told).file == file
    assert told.calls and file.read_bytes() == whole


def test_where_they_cannot_be_kept_they_are_made_all_the_same(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    grids = grids_of([picture(1)], backbone, PREPROCESSOR, tmp_path / "a file", Told())
    assert grids.file is None and grids.get(picture(1)) is not None


def test_a_broken_picture_is_told(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="broken or cut short"):
        grids_of([picture(1), picture(2)[:50]], backbone, PREPROCESSOR, None, Told())


CAPTIONER = {
    "architecture": "generator",
    "encoder": {"input": "image", "backbone": {"image_size": [16, 16], "channels": [4, 8]}},
    "decoder": {"embedding_size": 16, "attention": "additive", "recurrent": {"hidden_size": 32}},
}
RUN = {"max_steps": 6, "max_eval_samples": 20, "rows_per_batch": 16}


def captioner(directory: Path, **changes: Any) -> Any:
    given = {"model": CAPTIONER, "data": {"generated": "captions"}, "run": RUN} | changes
    return recipe("caption", directory=directory, **given)


def test_a_run_whose_backbone_is_frozen_reads_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "cache"))
    train(captioner(tmp_path / "begun"))
    assert not (tmp_path / "cache").exists()  # its backbone has learned
    further = {"model": {"init_from": str(tmp_path / "begun")}, "data": {"generated": "captions", "tokenizer": {}}}
    frozen = captioner(tmp_path / "frozen", **further, optim={"freeze": ["encoder.backbone.*"]})
    capsys.readouterr()
    train(frozen)
    assert f"are in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    before, after = (load_pretrained(tmp_path / name).model.state_dict() for name in ("begun", "frozen"))
    backbone = [name for name in before if name.startswith("encoder.backbone.")]
    assert backbone and all(torch.equal(before[name], after[name]) for name in backbone)
    # The same without grids, but for what 16 bits round away.
    none = Grids(torch.zeros(0, 32, dtype=torch.uint8), torch.zeros(0))
    monkeypatch.setattr("training.data.examples.grids_of", lambda *_: none)
    train(captioner(tmp_path / "pictures", **further, optim={"freeze": ["encoder.backbone.*"]}))
    other = load_pretrained(tmp_path / "pictures").model.state_dict()
    for name, tensor in after.items():
        assert torch.allclose(tensor.float(), other[name].float(), atol=2e-3), name


@pytest.mark.parametrize(
    ("freeze", "is_frozen"),
    [
        (["encoder.backbone.*"], True),
        (["encoder.*"], True),
        (["encoder.backbone.stages.*"], False),  # conv1 learns
        ([], False),
    ],
)
def test_what_counts_as_frozen(tmp_path: Path, freeze: list[str], is_frozen: bool) -> None:
    directory = tmp_path / "begun"
    config = captioner(directory, run={**RUN, "max_steps": 1})
    train(config)
    further = {"init_from": str(directory)}
    found = captioner(
        tmp_path / "next", model=further, data={"generated": "captions", "tokenizer": {}}, optim={"freeze": freeze}
    )
    saved = load_pretrained(directory)
    keep_begin(frozen_weights(found, saved.config), tmp_path)
    backbone = frozen_backbone(found, saved.config, tmp_path)
    assert (backbone is not None) == is_frozen
    if backbone is not None:
        kept = backbone.state_dict()
        theirs = {name: saved.model.state_dict()[f"encoder.backbone.{name}"] for name in kept}
        assert all(torch.equal(kept[name], theirs[name]) for name in kept)
    assert frozen_backbone(config, saved.config, tmp_path) is None  # begins with drawn weights


def test_a_run_that_goes_on_has_the_backbone_that_it_began_with(tmp_path: Path, train_until: TrainUntil) -> None:
    """Though the model that it came from has been trained anew meanwhile."""
    train(captioner(tmp_path / "begun"))
    again = captioner(tmp_path / "again", run={**RUN, "seed": 9})
    further = {"model": {"init_from": str(tmp_path / "begun")}, "data": {"generated": "captions", "tokenizer": {}}}
    options = {**further, "optim": {"freeze": ["encoder.backbone.*"]}, "run": {**RUN, "save_steps": 2}}
    train(captioner(tmp_path / "whole", **options))
    train_until(captioner(tmp_path / "stopped", **options), 3)
    train(again)
    shutil.rmtree(tmp_path / "begun")
    (tmp_path / "again").rename(tmp_path / "begun")
    train(captioner(tmp_path / "stopped", **options))
    assert load_pretrained(tmp_path / "whole").revision == load_pretrained(tmp_path / "stopped").revision


def test_grids_that_look_like_pictures_are_not_made(tmp_path: Path) -> None:
    backbone = {"image_size": [16, 16], "channels": [4, 3]}
    model = {**CAPTIONER, "encoder": {"input": "image", "backbone": backbone}}
    train(captioner(tmp_path / "begun", model=model, run={**RUN, "max_steps": 1}))
    found = captioner(
        tmp_path / "next",
        model={"init_from": str(tmp_path / "begun")},
        data={"generated": "captions", "tokenizer": {}},
        optim={"freeze": ["encoder.backbone.*"]},
    )
    assert frozen_backbone(found, load_pretrained(tmp_path / "begun").config, tmp_path) is None
