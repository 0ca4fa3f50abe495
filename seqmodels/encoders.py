"""Encoders: text, an image, frames or numeric features -> Memory.

Each is called as encoder(inputs, lengths, state) and returns (Memory, State or None): a one-directional recurrent
encoder that is given a State returns the next one, so that a long input can come in pieces. Padding stands at the
end of a row and is never read.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmodels.characters import CharacterEncoder
from seqmodels.config import (
    EncoderConfig,
    FeatureEncoderConfig,
    FrameEncoderConfig,
    ImageEncoderConfig,
    StackConfig,
    TextEncoderConfig,
)
from seqmodels.dropout import dropout, embed
from seqmodels.recurrent import Recurrent
from seqmodels.state import Memory, State
from seqmodels.vision import Backbone, CompactResNet, Vectors, build_backbone

Encoded = tuple[Memory, State | None]


class RecurrentEncoder(nn.Module):
    """Steps of features (B, S, in) -> Memory of the same S. The common half of the encoders below."""

    def __init__(self, config: StackConfig, input_size: int) -> None:
        super().__init__()
        self.recurrent = Recurrent.from_config(config.recurrent, input_size, config.locked_dropout)
        self.dropout, self.locked_dropout = config.dropout, config.locked_dropout
        self.input_dropout = config.rate_on_inputs
        self.output_size = self.summary_size = self.recurrent.output_size

    def start(self, rows: int) -> State:
        """Of a one-directional encoder: what each row's input begins from."""
        return self.recurrent.initial_state(rows)

    def read(self, steps: Tensor, lengths: Tensor, state: State | None) -> Encoded:
        """steps: (B, S, in); lengths: (B,), at least 1 each."""
        steps = dropout(steps, self.input_dropout, self.training, self.locked_dropout)
        # A causal stack needs lengths only to stop its state at the row's end.
        ragged = self.recurrent.bidirectional or state is not None
        values, after = self.recurrent(steps, lengths if ragged else None, state)
        values = dropout(values, self.dropout, self.training, self.locked_dropout)
        memory = Memory(values, _mask(lengths, steps.shape[1]), self._summary(values, lengths))
        return memory, None if state is None else after

    def _summary(self, values: Tensor, lengths: Tensor) -> Tensor:
        """What each direction knew at its end: forward at the last position, backward at the first. (B, D)"""
        last = values[torch.arange(len(values), device=values.device), lengths - 1]
        if not self.recurrent.bidirectional:
            return last
        half = self.recurrent.hidden_size
        return torch.cat([last[:, :half], values[:, 0, half:]], dim=1)


class TextEncoder(RecurrentEncoder):
    """Token ids (B, S) of int64; (B, S, 1 + L) where each comes with the spelling of its word."""

    def __init__(self, config: TextEncoderConfig) -> None:
        characters = CharacterEncoder(config.characters) if config.characters else None
        super().__init__(config, config.embedding_size + (characters.output_size if characters else 0))
        self.characters = characters
        self.embedding_dropout = config.embedding_dropout
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)

    def forward(self, inputs: Tensor, lengths: Tensor, state: State | None = None) -> Encoded:
        tokens = inputs if self.characters is None else inputs[:, :, 0]
        steps = embed(tokens, self.embedding, self.embedding_dropout, self.training)
        if self.characters is not None:
            steps = torch.cat([steps, self.characters(inputs[:, :, 1:])], dim=2)
        return self.read(steps, lengths, state)


class FeatureEncoder(RecurrentEncoder):
    """Numeric features over time (B, S, feature_size) of float32."""

    def __init__(self, config: FeatureEncoderConfig) -> None:
        super().__init__(config, config.feature_size)

    def forward(self, inputs: Tensor, lengths: Tensor, state: State | None = None) -> Encoded:
        return self.read(inputs, lengths, state)


class FrameEncoder(RecurrentEncoder):
    """Frames of a video (B, S, C, height, width), or vectors of them (B, S, V), where those have been made before: each
    through the backbone, then through time."""

    def __init__(self, config: FrameEncoderConfig) -> None:
        backbone, grid = build_backbone(config.backbone), config.backbone.grid
        is_compact = isinstance(backbone, CompactResNet)
        super().__init__(config, backbone.output_size * grid[0] * grid[1] if is_compact else backbone.pooled_size)
        self.backbone = backbone

    def forward(self, inputs: Tensor, lengths: Tensor, state: State | None = None) -> Encoded:
        vectors = inputs if inputs.dim() == 3 else see(inputs, lengths, Vectors(self.backbone))
        return self.read(vectors, lengths, state)


class ImageEncoder(nn.Module):
    """An image -> Memory whose positions are the cells of the backbone's grid, row by row.

    Inputs are images (B, C, height, width), or grids (B, D, h, w) of the backbone, where they have been made before.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone)
        self.output_size = self.backbone.output_size
        self.summary_size = self.backbone.pooled_size
        self.dropout, self.summary_dropout = config.dropout, config.summary_dropout
        self._channels = config.backbone.in_channels  # of a picture; a grid has others
        self._pools = not isinstance(self.backbone, CompactResNet)
        cells = config.backbone.grid[0] * config.backbone.grid[1]
        self.places = nn.Parameter(torch.randn(cells, self.output_size) * 0.1)  # where a cell stands in the picture

    def forward(self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None) -> Encoded:
        grid = see(inputs[:, None], None, self.backbone)[:, 0] if inputs.shape[1] == self._channels else inputs
        values = grid.flatten(2).mT + self.places  # (B, S, D)
        values = F.dropout(values, self.dropout, self.training)
        mask = values.new_ones(values.shape[:2], dtype=torch.bool)
        # As the published weights were trained; a compact backbone has no such habit.
        summary = self.backbone.pool(grid) if self._pools else values.mean(1)
        return Memory(values, mask, F.dropout(summary, self.summary_dropout, self.training)), None


def see(pictures: Tensor, lengths: Tensor | None, backbone: Backbone | Vectors) -> Tensor:
    """Pictures (B, S, C, height, width) -> what the backbone makes of each, (B, S, ...).

    Outside training, a large backbone on a CPU sees one at a time: a picture gets the same bits in any company, and
    nothing is computed for copies, with which small batches are padded, or beyond lengths.
    """
    is_compact = isinstance(getattr(backbone, "backbone", backbone), CompactResNet)
    if torch.is_grad_enabled() or pictures.device.type != "cpu" or is_compact:
        made: Tensor = backbone(pictures.flatten(0, 1))
        return made.view(*pictures.shape[:2], *made.shape[1:])
    known: dict[bytes, Tensor] = {}

    def alone(picture: Tensor) -> Tensor:
        key = picture.numpy().tobytes()
        if key not in known:
            known[key] = backbone(picture[None])
        return known[key]

    counts = [pictures.shape[1]] * len(pictures) if lengths is None else lengths.tolist()
    rows = [torch.cat([alone(one) for one in row[:count]]) for row, count in zip(pictures, counts, strict=True)]
    as_long_as_all = rows[0].new_empty(pictures.shape[1], *rows[0].shape[1:])
    return nn.utils.rnn.pad_sequence([*rows, as_long_as_all], batch_first=True)[:-1]


def _mask(lengths: Tensor, positions: int) -> Tensor:
    return torch.arange(positions, device=lengths.device) < lengths[:, None]


def build_encoder(config: EncoderConfig) -> TextEncoder | ImageEncoder | FrameEncoder | FeatureEncoder:
    if isinstance(config, TextEncoderConfig):
        return TextEncoder(config)
    if isinstance(config, ImageEncoderConfig):
        return ImageEncoder(config)
    if isinstance(config, FrameEncoderConfig):
        return FrameEncoder(config)
    return FeatureEncoder(config)
