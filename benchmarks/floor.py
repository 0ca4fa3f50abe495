"""The arithmetic floor of decoding: the time of the matrix products of the steps taken, and of nothing else.

What no search, framework or memory layout can go below while it computes in float32 with this library's products:
recurrent gates (one product over input and hidden), attention, combine and output projection for the rows of every
step, and the encoder's products. Biases, cell equations, softmax, top-k and moves of rows are left out. Products run in
the order of a real step, so that a cache smaller than the weights is missed as often as there.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.workload import least_seconds
from seqmodels.config import DecoderConfig, ModelConfig, RecurrentConfig, TextEncoderConfig
from seqmodels.recurrent import NUM_GATES

Product = tuple[Tensor, Tensor]  # left @ right
REPEATS = 5


class Floor:
    """Times the products of one model's shapes with random numbers, at the threads torch is set to."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.decoder is not None
        self.config = config
        self.decoder = config.decoder
        self.memory_size = config.encoder.output_size if config.encoder else 0
        shapes = step_shapes(self.decoder, self.memory_size)
        # A product can prefer its weights one way or the other; the floor is the faster of the two.
        stored = [torch.randn(outputs, inputs).mT for inputs, outputs in shapes]
        self.layouts = [stored, [weight.contiguous() for weight in stored]]

    def seconds(self, rows: Sequence[int], num_beams: int, positions: int, batches: int, batch: int) -> float:
        """Of a run with so many rows in each step, sources of `positions`, encoded in `batches` of `batch`."""
        steps = sum(self.step_seconds(n, num_beams, positions) * count for n, count in Counter(rows).items())
        return steps + batches * self.encode_seconds(batch, positions)

    def step_seconds(self, rows: int, num_beams: int, positions: int) -> float:
        """One step of so many rows, whose requests look at memories of so many positions."""
        attention = self._attention(rows // num_beams, num_beams, positions)
        return min(
            _seconds([*[(torch.randn(rows, len(weight)), weight) for weight in layout], *attention])
            for layout in self.layouts
        )

    def encode_seconds(self, batch: int, positions: int) -> float:
        """One batch of sources through a text encoder, with the attention's keys and the decoder's start."""
        encoder = self.config.encoder
        if not isinstance(encoder, TextEncoderConfig):
            return 0.0
        products = encoder_products(encoder.recurrent, encoder.embedding_size, batch, positions)
        if self.decoder.attention in ("general", "additive"):
            products.append(_product(batch * positions, self.memory_size, self.decoder.recurrent.output_size))
        return _seconds(products)

    def _attention(self, requests: int, num_beams: int, positions: int) -> list[Product]:
        if self.decoder.attention == "none" or not self.memory_size:
            return []
        hidden = self.decoder.recurrent.output_size
        scores = torch.randn(requests, num_beams, hidden), torch.randn(requests, positions, hidden).mT
        context = torch.randn(requests, num_beams, positions), torch.randn(requests, positions, self.memory_size)
        return [scores, context]


def step_shapes(decoder: DecoderConfig, memory_size: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of each product that a row goes through in one step of the decoder."""
    recurrent, attends = decoder.recurrent, decoder.attention != "none" and memory_size > 0
    hidden = recurrent.hidden_size
    sizes = [decoder.embedding_size] + [hidden] * (recurrent.num_layers - 1)
    shapes = [(size + hidden, NUM_GATES[recurrent.cell] * hidden) for size in sizes]
    if decoder.attention == "additive" and attends:
        shapes.append((hidden, hidden))
    features = decoder.embedding_size if decoder.tie_embeddings else hidden
    if attends or decoder.tie_embeddings:
        shapes.append((hidden + memory_size if attends else hidden, features))
    return [*shapes, (features, decoder.vocab_size)]


def encoder_products(recurrent: RecurrentConfig, input_size: int, batch: int, positions: int) -> list[Product]:
    """All inputs at once, then the hidden state position by position; each layer, each direction."""
    hidden, gates = recurrent.hidden_size, NUM_GATES[recurrent.cell] * recurrent.hidden_size
    products = []
    for size in [input_size] + [recurrent.output_size] * (recurrent.num_layers - 1):
        for _ in range(2 if recurrent.bidirectional else 1):
            products.append(_product(batch * positions, size, gates))
            products += [_product(batch, hidden, gates)] * positions
    return products


def _product(rows: int, inputs: int, outputs: int) -> Product:
    return torch.randn(rows, inputs), torch.randn(outputs, inputs).mT


@torch.inference_mode()
def _seconds(products: Sequence[Product]) -> float:
    return least_seconds(lambda: [left @ right for left, right in products], REPEATS)
