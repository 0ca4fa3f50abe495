"""Published weights that a run begins with: files that fit to the last name, and those that do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.pretrained import load_pretrained
from seqmodels.vision import build_backbone
from tests.training.recipes import recipe
from training.backbones import read_backbone
from training.data import generated
from training.evaluate import evaluate
from training.run import train

SMALL = {"kind": "resnet18", "image_size": [32, 32]}


def config_of(backbone: dict[str, Any]) -> ModelConfig:
    encoder = {"input": "image", "backbone": backbone}
    return ModelConfig.parse({"architecture": "classifier", "encoder": encoder, "labels": ["a", "b"]})


@pytest.fixture
def published() -> dict[str, Tensor]:
    """As torchvision's file: all of the backbone, and the classifier of ImageNet."""
    backbone = build_backbone(config_of(SMALL).encoder.backbone)  # type: ignore[union-attr]
    return {**backbone.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def written(weights: dict[str, Tensor], path: Path) -> str:
    save_file(weights, path)
    return str(path)


def test_all_but_the_classifier_is_taken(published: dict[str, Tensor], tmp_path: Path) -> None:
    found = read_backbone(written(published, tmp_path / "resnet.safetensors"), config_of(SMALL))
    expected = {f"encoder.backbone.{name}": value for name, value in published.items() if not name.startswith("fc.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_numbers_of_16_bits_become_those_of_32(published: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in published.items()}
    found = read_backbone(written(half, tmp_path / "resnet.safetensors"), config_of(SMALL))
    assert found["encoder.backbone.conv1.weight"].dtype == torch.float32
    assert found["encoder.backbone.bn1.num_batches_tracked"].dtype == torch.int64


def test_numbers_of_batches_may_be_missing(published: dict[str, Tensor], tmp_path: Path) -> None:
    fewer = {name: value for name, value in published.items() if not name.endswith("num_batches_tracked")}
    found = read_backbone(written(fewer, tmp_path / "resnet.safetensors"), config_of(SMALL))
    assert found["encoder.backbone.bn1.num_batches_tracked"] == 0


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop("layer1.0.conv1.weight"), "lacks 'layer1.0.conv1.weight', which resnet18 has"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "holds 'extra', which resnet18 has not"),
        (
            lambda weights: weights.update({"bn1.weight": torch.zeros(65)}),
            r"'bn1.weight' has shape \(65,\), but .*\(64,\)",
        ),
        (lambda weights: weights["bn1.bias"].fill_(torch.nan), "'bn1.bias' holds NaN or infinity"),
    ],
)
def test_weights_of_another_backbone_are_refused(
    published: dict[str, Tensor], tmp_path: Path, change: Change, told: str
) -> None:
    change(published)
    with pytest.raises(ConfigError, match=rf"data\.backbone_weights .*resnet\.safetensors.*{told}"):
        read_backbone(written(published, tmp_path / "resnet.safetensors"), config_of(SMALL))


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "resnet18.pth")
    with pytest.raises(ConfigError, match=r"resnet18\.pth: a pickle can run any code and is not read"):
        read_backbone(str(tmp_path / "resnet18.pth"), config_of(SMALL))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken\.safetensors is cut short, broken or no safetensors file"):
        read_backbone(str(tmp_path / "broken.safetensors"), config_of(SMALL))
    with pytest.raises(ConfigError, match="is no file; name a safetensors file, or a model of the hub"):
        read_backbone(str(tmp_path / "none.safetensors"), config_of(SMALL))
    with pytest.raises(ConfigError, match="no file here, and the hub cannot be reached"):
        read_backbone("timm/resnet18.a1_in1k", config_of(SMALL))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            {"encoder": {"input": "image"}},
            "has no backbone of which weights are published; set model.encoder.backbone.kind",
        ),
        ({"encoder": {"input": "text"}}, "has no backbone of which weights are published"),
    ],
)
def test_recipes_without_such_a_backbone_are_refused(model: dict[str, Any], told: str) -> None:
    data = {"path": "x", "columns": {"input": "a", "target": "b"}, "backbone_weights": "w.safetensors"}
    with pytest.raises(ConfigError, match=f"data.backbone_weights is 'w.safetensors', but the model {told}"):
        recipe("classify", data=data, model={"architecture": "classifier", **model})


def test_a_run_begins_with_them_and_keeps_what_it_needs(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "cache"))
    weights = written(published, tmp_path / "resnet.safetensors")
    model = {
        "architecture": "generator",
        "encoder": {"input": "image", "backbone": SMALL},
        "decoder": {"embedding_size": 8, "recurrent": {"hidden_size": 8}},
    }
    data = {"generated": "captions", "backbone_weights": weights}
    run = {"max_steps": 1, "max_eval_samples": 4, "rows_per_batch": 4, "save_steps": 1}
    sections: dict[str, Any] = {"model": model, "data": data, "run": run, "optim": {"freeze": ["encoder.backbone.*"]}}
    train(recipe("caption", directory=tmp_path / "run", **sections))
    saved = load_pretrained(tmp_path / "run")
    assert torch.equal(saved.model.state_dict()["encoder.backbone.conv1.weight"], published["conv1.weight"])
    assert saved.preprocessor is not None and saved.preprocessor.mean == (0.485, 0.456, 0.406)


def test_features_of_a_split_are_computed_once_for_all_that_is_tried_on_it(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(generated.SIZES, "captions", (16, 4, 6))
    model = {
        "architecture": "generator",
        "encoder": {"input": "image", "backbone": SMALL},
        "decoder": {"embedding_size": 8, "attention": "general", "recurrent": {"hidden_size": 8}},
    }
    data = {"generated": "captions", "backbone_weights": written(published, tmp_path / "resnet.safetensors")}
    made = recipe("caption", directory=tmp_path / "run", model=model, data=data, run={"max_steps": 1})
    train(made)
    assert not (tmp_path / "cache").exists(), "the backbone has learned"
    kept, _ = evaluate(tmp_path / "run", made, "test", {"max_new_tokens": 5})
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("training.data.grids._made", None)  # nothing is to be made again
    beams, _ = evaluate(tmp_path / "run", made, "test", {"max_new_tokens": 5, "num_beams": 3})
    assert beams["scores"]["nll"] == kept["scores"]["nll"]
    monkeypatch.setattr("training.evaluate._with_grids", lambda codec, *_: codec)
    plain, _ = evaluate(tmp_path / "run", made, "test", {"max_new_tokens": 5})
    assert kept["scores"] == pytest.approx(plain["scores"], abs=1e-3)


def test_frames_of_a_published_backbone_are_vectors_and_kept_too(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(generated.SIZES, "frames", (12, 4, 6))
    encoder = {"input": "frames", "backbone": SMALL, "recurrent": {"hidden_size": 8}}
    sections: dict[str, Any] = {
        "model": {"architecture": "tagger", "encoder": encoder},
        "data": {"generated": "frames", "backbone_weights": written(published, tmp_path / "resnet.safetensors")},
        "optim": {"freeze": ["encoder.backbone.*"]},
    }
    made = recipe("tag", directory=tmp_path / "run", **sections, run={"max_steps": 2})
    train(made)
    (kept,) = (tmp_path / "cache").iterdir()
    assert load_file(kept)["grids"].shape[1:] == (512,)
    model = load_pretrained(tmp_path / "run").model
    assert model.encoder is not None and model.encoder.recurrent.weights()[0].input.shape[1] == 512
    scores = evaluate(tmp_path / "run", made, "test", {})[0]["scores"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("training.evaluate._with_grids", lambda codec, *_: codec)
    plain = evaluate(tmp_path / "run", made, "test", {})[0]["scores"]
    assert scores == pytest.approx(plain, abs=1e-3)


def test_what_mobilenet_was_trained_on_is_128_around_128() -> None:
    from training.data.pictures import preprocessor_for

    preprocessor = preprocessor_for(config_of({"kind": "mobilenet_v2"}))
    assert preprocessor is not None and preprocessor.size == (224, 224)
    (mean,), (std,) = preprocessor.mean, preprocessor.std
    for pixel in (0, 128, 255):
        assert (pixel / 255 - mean) / std == pytest.approx(pixel / 128 - 1)


def test_a_backbone_that_is_frozen_whole_begins_with_weights(tmp_path: Path) -> None:
    model = {
        "architecture": "generator",
        "encoder": {"input": "image", "backbone": SMALL},
        "decoder": {"embedding_size": 8, "recurrent": {"hidden_size": 8}},
    }
    optim = {"freeze": ["encoder.backbone.*"]}
    with pytest.raises(ConfigError, match=r"holds the whole backbone, but data\.backbone_weights names no weights"):
        train(recipe("caption", tmp_path, model=model, data={"generated": "captions"}, optim=optim))
