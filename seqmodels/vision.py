"""CNN backbones: pictures -> a grid of features, and a vector of each grid.

A compact residual one to train from nothing, and two families with published weights: ResNet (He et al. 2016) with the
parameter names of torchvision and timm, and MobileNetV2 (Sandler et al. 2018) with batch normalisation folded into its
convolutions. Knows pictures as tensors; knows no file.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import AnyBackboneConfig, BackboneConfig, PublishedBackboneConfig

# A ResNet's blocks per stage, and whether they are bottlenecks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
# Of MobileNetV2's inverted residual blocks: how many times wider they are inside, their outputs, how many, the first
# one's stride. Table 2 of the paper.
INVERTED = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in, h, w) -> (B, out, h/stride, w/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut: (B, in, h, w) -> (B, 4 * width, h/stride, w/stride). The stride is that of the
    3x3 convolution, as in all published weights but the first."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class Backbone(nn.Module):
    """(B, C, height, width) -> (B, D, h, w). What all backbones have in common; `pool` makes (B, P) of that."""

    output_size: int  # D
    pooled_size: int  # P

    def pool(self, grid: Tensor) -> Tensor:
        return grid.mean((2, 3))


class Vectors(nn.Module):
    """A backbone of frames: (B, C, height, width) -> (B, V). A compact one's grid is laid flat, so that it still knows
    where things are; that of a published one is pooled, as its weights were trained."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor) -> Tensor:
        grids = self.backbone(frames)
        return grids.flatten(1) if isinstance(self.backbone, CompactResNet) else self.backbone.pool(grids)


class CompactResNet(Backbone):
    """One stage per entry of `channels`, each but the first halving the size; the stem is the small-picture one: 3x3,
    no pooling."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.in_channels, config.channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.channels[0])
        self.stages = nn.ModuleList()
        previous = config.channels[0]
        for index, width in enumerate(config.channels):
            blocks = [BasicBlock(previous, width, stride=1 if index == 0 else 2)]
            blocks += [BasicBlock(width, width, stride=1) for _ in range(config.blocks_per_stage - 1)]
            self.stages.append(nn.Sequential(*blocks))
            previous = width
        self.output_size = self.pooled_size = previous

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
        return x


class ResNet(Backbone):
    """A 7x7 stem and four stages that leave a 32nd of height and width."""

    def __init__(self, config: PublishedBackboneConfig) -> None:
        super().__init__()
        numbers, has_bottlenecks = RESNETS[config.kind]
        block = Bottleneck if has_bottlenecks else BasicBlock
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        previous = 64
        for index, number in enumerate(numbers):
            width = 64 * 2**index
            stage = nn.Sequential()
            for place in range(number):
                stage.append(block(previous, width, stride=2 if index and not place else 1))
                previous = width * block.expansion
            self.add_module(f"layer{index + 1}", stage)
        self.output_size = self.pooled_size = previous

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
        return x


class SameConv2d(nn.Conv2d):
    """Padded as TensorFlow's SAME: (h, w) -> (ceil(h/stride), ceil(w/stride)), an odd zero at the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (kernel, _), (stride, _) = x.shape[2:], self.kernel_size, self.stride
        down, across = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in (height, width))
        padded = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        convolved: Tensor = super().forward(padded)
        return convolved


class InvertedResidual(nn.Module):
    """Wider by 1x1, 3x3 on each channel, narrower by 1x1: (B, in, h, w) -> (B, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, expansion: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.expand = nn.Conv2d(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, 3, stride, groups=width)
        self.project = nn.Conv2d(width, out_channels, 1)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x)) if self.expand else x
        y: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + y if self.adds else y


class MobileNetV2(Backbone):
    """17 inverted residual blocks, which leave a 32nd of height and width; a wider 1x1 convolution before pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, 2)
        self.blocks = nn.Sequential()
        previous = 32
        for expansion, width, number, stride in INVERTED:
            for place in range(number):
                self.blocks.append(InvertedResidual(previous, expansion, width, 1 if place else stride))
                previous = width
        self.output_size, self.pooled_size = previous, 1280
        self.head = nn.Conv2d(previous, self.pooled_size, 1)

    def forward(self, images: Tensor) -> Tensor:
        grid: Tensor = self.blocks(F.relu6(self.stem(images)))
        return grid

    def pool(self, grid: Tensor) -> Tensor:
        return F.relu6(self.head(grid)).mean((2, 3))


def build_backbone(config: AnyBackboneConfig) -> Backbone:
    """With initial weights drawn from torch's global generator."""
    if isinstance(config, BackboneConfig):
        return CompactResNet(config)
    return MobileNetV2() if config.kind == "mobilenet_v2" else ResNet(config)
