"""A compact residual CNN: image -> grid of features.

Parameter names are those of the published ResNets (He et al. 2016), the stem is the small-picture one: 3x3, no
pooling. Knows pictures as tensors; knows no file format.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.config import BackboneConfig


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in, h, w) -> (B, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Backbone(nn.Module):
    """(B, C, height, width) -> (B, D, h, w): one stage per entry of `channels`, each but the first halving the size."""

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
        self.output_size = previous
        self.grid = config.grid

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
        return x
