"""The arithmetic floor of decoding: the time of the matrix products of the steps taken, and of nothing else.

What no search and no framework can go below while it computes in float32 with the kernels that we know:
recurrent gates (one product over input and hidden), attention, combine and output projection for the rows of every
step, and the encoder's products. Biases, cell equations, softmax, top-k and moves of rows are left out. Products run in
the order of a real step, so that a cache smaller than the weights is missed as often as there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.workload import least_seconds
from seqmodels.cells import NUM_GATES
from seqmodels.config import MINIMAL, DecoderConfig, ModelConfig, RecurrentConfig, TextEncoderConfig
from seqmodels.kernels import PackedLinear

Linear = Callable[[Tensor], Tensor]
Product = Callable[[], Tensor]
REPEATS = 5


class Floor:
    """Times the products of one model's shapes with random numbers, at the threads torch is set to.

    The least time seen for a shape is kept for later results, so a disturbance cannot lift the floor for long.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.decoder is not None
        self.config = config
        self.decoder = config.decoder
        self.memory_size = config.encoder.output_size if config.encoder else 0
        weights = [torch.randn(outputs, inputs) for inputs, outputs in step_shapes(self.decoder, self.memory_size)]
        self._step = [[(layout(weight), weight.shape[1]) for weight in weights] for layout in LAYOUTS]
        self._least: dict[tuple[int, ...], float] = {}

    def seconds(self, rows: Sequence[int], num_beams: int, positions: int, batches: float, batch: int) -> float:
        """Of a run with so many rows in each step, sources of `positions`, in `batches` of `batch`, whole or not."""
        steps = sum(self.step_seconds(n, num_beams, positions) * count for n, count in Counter(rows).items())
        return steps + batches * self.encode_seconds(batch, positions)

    def step_seconds(self, rows: int, num_beams: int, positions: int) -> float:
        """One step of so many rows, whose requests look at memories of so many positions."""
        attention = self._attention(rows // num_beams, num_beams, positions)
        ways = [[partial(linear, torch.randn(rows, size)) for linear, size in layout] for layout in self._step]
        return self._fastest((rows, num_beams, positions), [[*products, *attention] for products in ways])

    def encode_seconds(self, batch: int, positions: int) -> float:
        """One batch of sources through a text encoder, with the attention's keys."""
        encoder = self.config.encoder
        if not isinstance(encoder, TextEncoderConfig):
            return 0.0
        keys = (self.memory_size, self.decoder.recurrent.output_size)
        ways = []
        for layout in LAYOUTS:
            products = encoder_products(encoder.recurrent, encoder.embedding_size, batch, positions, layout)
            if self.decoder.attention in ("general", "additive"):
                products.append(_product(layout, batch * positions, *keys))
            ways.append(products)
        return self._fastest((batch, positions), ways)

    def _attention(self, requests: int, num_beams: int, positions: int) -> list[Product]:
        if self.decoder.attention == "none" or not self.memory_size:
            return []
        hidden = self.decoder.recurrent.output_size
        scores = torch.randn(requests, num_beams, hidden), torch.randn(requests, positions, hidden).mT
        context = torch.randn(requests, num_beams, positions), torch.randn(requests, positions, self.memory_size)
        return [partial(torch.matmul, *scores), partial(torch.matmul, *context)]

    @torch.inference_mode()
    def _fastest(self, shape: tuple[int, ...], ways: Sequence[Sequence[Product]]) -> float:
        """Of some ways to do the same products."""
        now = min(least_seconds(lambda: [product() for product in products], REPEATS) for products in ways)  # noqa: B023
        self._least[shape] = min(now, self._least.get(shape, now))
        return self._least[shape]


def stored(weight: Tensor) -> Linear:
    """As `torch.nn.Linear` stores it, outputs first."""
    return partial(torch.matmul, other=weight.mT)


def turned(weight: Tensor) -> Linear:
    return partial(torch.matmul, other=weight.mT.contiguous())


# Which way a product wants its weights depends on its rows; the floor is the fastest.
LAYOUTS: tuple[Callable[[Tensor], Linear], ...] = (stored, turned, PackedLinear)


def step_shapes(decoder: DecoderConfig, memory_size: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of each product that a row goes through in one step of the decoder."""
    recurrent, attends = decoder.recurrent, decoder.attention != "none" and memory_size > 0
    hidden = recurrent.hidden_size
    sizes = [decoder.embedding_size] + [hidden] * (recurrent.num_layers - 1)
    beside = 0 if recurrent.cell in MINIMAL else hidden
    shapes = [(size + beside, NUM_GATES[recurrent.cell] * hidden) for size in sizes]
    if decoder.attention == "additive" and attends:
        shapes.append((hidden, hidden))
    features = decoder.embedding_size if decoder.tie_embeddings else hidden
    if attends or decoder.tie_embeddings:
        shapes.append((hidden + memory_size if attends else hidden, features))
    return [*shapes, (features, decoder.vocab_size)]


def encoder_products(
    recurrent: RecurrentConfig, input_size: int, batch: int, positions: int, layout: Callable[[Tensor], Linear]
) -> list[Product]:
    """All inputs at once, then the hidden state position by position where it is multiplied; of all layers."""
    hidden, gates = recurrent.hidden_size, NUM_GATES[recurrent.cell] * recurrent.hidden_size
    products = []
    for size in [input_size] + [recurrent.output_size] * (recurrent.num_layers - 1):
        for _ in range(2 if recurrent.bidirectional else 1):
            products.append(_product(layout, batch * positions, size, gates))
            if recurrent.cell not in MINIMAL:
                products += [_product(layout, batch, hidden, gates)] * positions
    return products


def _product(layout: Callable[[Tensor], Linear], rows: int, inputs: int, outputs: int) -> Product:
    return partial(layout(torch.randn(outputs, inputs)), torch.randn(rows, inputs))
