"""What goes to the peers and comes back, without any peer."""

from pathlib import Path

import pytest
import torch

from benchmarks.peers.exchange import Exported, encoder_weights, start_state, until_end
from seqmodels.models import SequenceGenerator
from tests.seqmodels.builders import make_translator


@pytest.fixture
def model() -> SequenceGenerator:
    return make_translator()


def test_exported_weights_and_sentences_come_back(tmp_path: Path, model: SequenceGenerator) -> None:
    Exported("models/mine", model.state_dict(), [[5, 6, 3]]).save(tmp_path)
    back = Exported.load(tmp_path)
    assert (back.model_directory, back.sources) == ("models/mine", [[5, 6, 3]])
    assert back.weights.keys() == model.state_dict().keys()
    assert back.vocab_sizes == (40, 40)


def test_one_bidirectional_lstm_computes_our_encoder(model: SequenceGenerator) -> None:
    """And our bridge starts the decoder from it."""
    assert model.encoder is not None
    weights = model.state_dict()
    tokens = torch.tensor([[5, 6, 7, 8, 3]])
    memory = model.encode(tokens, torch.tensor([5]))
    hidden_size = memory.values.shape[2] // 2
    embedded = torch.nn.functional.embedding(tokens, weights["encoder.embedding.weight"])
    lstm = torch.nn.LSTM(embedded.shape[2], hidden_size, batch_first=True, bidirectional=True)
    lstm.load_state_dict({name.removeprefix("x."): value for name, value in encoder_weights(weights, "x").items()})
    values, (final, _) = lstm(embedded)
    torch.testing.assert_close(values, memory.values)
    start = torch.cat(start_state(weights, torch.cat([final[0], final[1]], dim=1)), dim=1)
    torch.testing.assert_close(start, model.start(memory, 1).values)


def test_an_answer_ends_with_its_end_mark() -> None:
    assert until_end([7, 8, 3, 9, 0]) == [7, 8, 3]
    assert until_end([7, 8, 0]) == [7, 8]
