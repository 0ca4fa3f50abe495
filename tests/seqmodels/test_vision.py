"""Backbones: names and shapes of published weights, convolutions by hand, classes of real pictures."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.config import ModelConfig, PublishedBackboneConfig
from seqmodels.encoders import see
from seqmodels.errors import ConfigError
from seqmodels.vision import Bottleneck, SameConv2d, build_backbone

PUBLISHED = {  # parameters without the classifier: of torchvision's documentation, less 1,000 x (features + 1)
    "resnet18": (11_689_512 - 513_000, 512),
    "resnet34": (21_797_672 - 513_000, 512),
    "resnet50": (25_557_032 - 2_049_000, 2048),
    "resnet101": (44_549_160 - 2_049_000, 2048),
    "mobilenet_v2": (3_489_097 - 1001 * 1281, 320),
}
NAMES = {  # some of each kind, as they stand in published files
    "resnet18": {
        "conv1.weight": (64, 3, 7, 7), "bn1.running_var": (64,), "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1), "layer2.0.downsample.1.bias": (128,),
        "layer4.1.bn2.num_batches_tracked": (),
    },
    "resnet34": {"layer3.5.conv2.weight": (256, 256, 3, 3), "layer4.2.bn1.weight": (512,)},
    "resnet50": {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer1.2.conv3.weight": (256, 64, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3), "layer4.2.bn3.running_mean": (2048,),
    },
    "resnet101": {"layer3.22.conv1.weight": (256, 1024, 1, 1)},
    "mobilenet_v2": {
        "stem.weight": (32, 3, 3, 3), "blocks.0.depthwise.weight": (32, 1, 3, 3), "blocks.0.project.bias": (16,),
        "blocks.6.expand.weight": (192, 32, 1, 1), "blocks.16.project.weight": (320, 960, 1, 1),
        "head.weight": (1280, 320, 1, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_shapes_and_numbers_are_those_of_published_weights(kind: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(PublishedBackboneConfig(kind=kind))  # type: ignore[arg-type]
    count, size = PUBLISHED[kind]
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    assert NAMES[kind].items() <= shapes.items()
    assert backbone.output_size == size and "blocks.0.expand.weight" not in shapes


@pytest.mark.parametrize("kind", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_grid_is_a_32nd_rounded_up(kind: str) -> None:
    config = PublishedBackboneConfig(kind=kind, image_size=(64, 80))  # type: ignore[arg-type]
    backbone = build_backbone(config).eval()
    with torch.no_grad():
        grid = backbone(torch.randn(2, 3, 64, 80))
        assert grid.shape == (2, config.output_size, *config.grid) == (2, config.output_size, 2, 3)
        assert backbone.pool(grid).shape == (2, backbone.pooled_size)


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_a_picture_has_the_same_features_in_any_company(threads: int) -> None:
    """To the last bit; and what is a copy of the first row, or padding, is not computed."""
    backbone, calls = build_backbone(PublishedBackboneConfig(kind="mobilenet_v2")).eval(), 0
    backbone.register_forward_pre_hook(lambda *_: count())

    def count() -> None:
        nonlocal calls
        calls += 1

    clips, before = torch.randn(3, 2, 3, 64, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = see(clips, None, backbone)
        assert together.shape == (3, 2, 320, 2, 2) and calls == 6
        for clip, grids in zip(clips, together, strict=True):
            for picture, grid in zip(clip, grids, strict=True):
                assert torch.equal(see(picture[None, None], None, backbone)[0, 0], grid)
        calls = 0
        padded = see(clips[[0, 1, 0, 0]], torch.tensor([2, 1, 2, 2]), backbone)
        assert calls == 3 and torch.equal(padded[[0, 2, 3]], together[[0, 0, 0]])
        assert torch.equal(padded[1, 0], together[1, 0]) and not padded[1, 1].any()
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(together, backbone(clips.flatten(0, 1)).view_as(together), atol=1e-5)


def test_same_padding_is_at_the_right_and_bottom_where_it_is_odd() -> None:
    convolution = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    # Windows begin at 0 and 2: the second ones lack a row or a column.
    assert convolution(picture).flatten().tolist() == [45.0, 39.0, 66.0, 50.0]
    odd = convolution(torch.ones(1, 1, 5, 5))  # one zero on each side
    assert odd.flatten().tolist() == [4.0, 6.0, 4.0, 6.0, 9.0, 6.0, 4.0, 6.0, 4.0]


def test_a_bottleneck_by_hand() -> None:
    block = Bottleneck(8, 2, stride=2).eval()
    x = torch.randn(1, 8, 4, 4)

    def normal(y: Tensor, name: str) -> Tensor:
        bn = block.get_submodule(name)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)  # type: ignore[arg-type]

    with torch.no_grad():
        y = normal(F.conv2d(x, block.conv1.weight), "bn1").relu()
        y = normal(F.conv2d(y, block.conv2.weight, stride=2, padding=1), "bn2").relu()
        y = normal(F.conv2d(y, block.conv3.weight), "bn3")
        shortcut = normal(F.conv2d(x, block.get_parameter("downsample.0.weight"), stride=2), "downsample.1")
        assert torch.allclose(block(x), (y + shortcut).relu(), atol=1e-6)


def test_classes_of_real_pictures(data_directory: Path) -> None:
    """The first eight of Flickr8k's test split: four show a dog, one a football player, and two people dressed up."""
    weights, labels, pictures = _real(data_directory)
    backbone = build_backbone(PublishedBackboneConfig(kind="mobilenet_v2")).eval()
    found = {name: tensor.float() for name, tensor in weights.items()}
    classifier = found.pop("classifier.weight"), found.pop("classifier.bias")
    backbone.load_state_dict(found)
    with torch.no_grad():
        scores = F.linear(backbone.pool(backbone(pictures)), *classifier)
    assert [labels[best] for best in scores.argmax(1)] == [
        "Rhodesian ridgeback", "Welsh springer spaniel", "cowboy boot", "bell cote, bell cot", "football helmet",
        "Ibizan hound, Ibizan Podenco", "academic gown, academic robe, judge's robe", "boxer",
    ]  # fmt: skip


def _real(directory: Path) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """MobileNetV2's weights and classes, and eight pictures as it takes them: (8, 3, 224, 224)."""
    from PIL import Image
    from safetensors.torch import load_file

    files = [directory / "weights/mobilenet_v2_1.0_224.safetensors", directory / "flickr8k/test-00000-of-00001.parquet"]
    if not all(file.is_file() for file in files):
        pytest.skip("the weights or the pictures are not here")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(files[1], columns=["image"]).slice(0, 8).to_pylist()
    pictures = []
    for row in rows:
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((224, 224))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(224, 224, 3)
        pictures.append(pixels.permute(2, 0, 1).float() / 128 - 1)
    labels = (directory / "weights/imagenet_labels_1001.txt").read_text().splitlines()
    return load_file(files[0]), labels, torch.stack(pictures)


def config_of(backbone: dict[str, object]) -> ModelConfig:
    encoder = {"input": "image", "backbone": backbone}
    return ModelConfig.parse({"architecture": "classifier", "encoder": encoder, "labels": ["a", "b"]})


def test_a_backbone_without_a_kind_is_the_compact_one() -> None:
    compact = config_of({"channels": [4, 8], "image_size": [8, 8]})
    assert compact == config_of({"kind": "compact", "channels": [4, 8], "image_size": [8, 8]}) and compact.grid == (
        4,
        4,
    )
    assert config_of({"kind": "resnet50"}).grid == (7, 7)


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ({"kind": "resnet50", "channels": [4]}, "encoder.backbone.channels: Extra inputs are not permitted"),
        ({"kind": "resnet19"}, "encoder.backbone.kind: Input should be 'resnet18', 'resnet34'"),
        ({"kind": "mobilenet_v2", "in_channels": 1}, "encoder.backbone.in_channels: Input should be 3 (got 1)"),
        ({"channels": [0]}, "encoder.backbone.channels.0: Input should be greater than 0 (got 0)"),
    ],
)
def test_faults_are_told_by_the_fields_of_the_backbone_that_is_meant(backbone: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as fault:
        config_of(backbone)
    assert told in str(fault.value)
