"""The products whose time is the floor are those that the model's own step does."""

import pytest

from benchmarks.floor import Floor, step_shapes
from seqmodels.models import SequenceGenerator
from tests.seqmodels.builders import make_translator


def matrices(model: SequenceGenerator) -> list[tuple[int, int]]:
    """(inputs, outputs) of what a decoder of one layer really holds, the input and recurrent matrix side by side."""
    decoder = model.decoder
    layer = decoder.recurrent.forward_layers[0]
    matrices = [matrix for name, matrix in layer.named_parameters() if "weight" in name]
    gates = sum(matrix.shape[1] for matrix in matrices), matrices[0].shape[0]
    assert decoder.combine is not None and decoder.output_weight is not None
    others = [decoder.combine.weight, decoder.output_weight]
    return [gates, *[(weight.shape[1], weight.shape[0]) for weight in others]]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "min_gru", "min_lstm"])
def test_shapes_are_those_of_the_model(cell: str) -> None:
    model = make_translator(cell=cell)
    assert model.encoder is not None and model.config.decoder is not None
    assert step_shapes(model.config.decoder, model.encoder.output_size) == matrices(model)


def test_the_floor_grows_with_the_steps() -> None:
    floor = Floor(make_translator().config)
    one = floor.seconds([10], num_beams=5, positions=7, batches=1, batch=2)
    many = floor.seconds([10] * 1000, num_beams=5, positions=7, batches=1, batch=2)
    assert 0 < one < many
