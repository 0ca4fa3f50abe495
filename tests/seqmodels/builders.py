"""Small random models for tests."""

from typing import Any

import torch

from seqmodels.config import ModelConfig
from seqmodels.models import Model, SequenceGenerator, build_model

# Every kind of recurrence, as fields of a `recurrent` section: those on fused kernels, then those without one.
FUSED: dict[str, dict[str, Any]] = {cell: {"cell": cell} for cell in ("rnn_tanh", "rnn_relu", "gru", "lstm")}
UNFUSED: dict[str, dict[str, Any]] = {
    "normalised RNN": {"cell": "rnn_tanh", "layer_norm": True},
    "normalised GRU": {"cell": "gru", "layer_norm": True},
    "normalised LSTM": {"cell": "lstm", "layer_norm": True},
    "GRU, zoneout": {"cell": "gru", "zoneout": 0.2},
    "LSTM, zoneout": {"cell": "lstm", "zoneout": 0.1, "cell_zoneout": 0.4},
    "normalised LSTM, zoneout": {"cell": "lstm", "layer_norm": True, "cell_zoneout": 0.3},
    "min_gru": {"cell": "min_gru"},
    "min_lstm": {"cell": "min_lstm"},
    "min_gru, zoneout": {"cell": "min_gru", "zoneout": 0.2},
}
RECURRENCES = FUSED | UNFUSED


def make_model(seed: int = 0, scale: float = 1.0, **fields: Any) -> Model:
    """A model of the given config with random weights, in evaluation mode; scale > 1 makes it more decided."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig.parse(fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def make_language_model(
    seed: int = 0, vocab_size: int = 5, hidden_size: int = 8, cell: str = "lstm", scale: float = 2.0, **decoder: Any
) -> SequenceGenerator:
    fields = {
        "vocab_size": vocab_size,
        "embedding_size": 8,
        "recurrent": {"cell": cell, "hidden_size": hidden_size},
        **decoder,
    }
    model = make_model(seed, scale, architecture="generator", decoder=fields)
    assert isinstance(model, SequenceGenerator)
    return model


def make_translator(
    seed: int = 0, vocab_size: int = 40, hidden_size: int = 16, cell: str = "lstm", attention: str = "general",
    scale: float = 1.5, num_layers: int = 1, embedding_size: int = 16, residual: bool = False,
    tie_embeddings: bool = False, attention_from: str = "last", attention_gate: bool = False, **recurrent: Any,
) -> SequenceGenerator:  # fmt: skip
    """recurrent: further fields of both stacks, such as layer_norm."""
    encoder = {
        "input": "text",
        "vocab_size": vocab_size,
        "embedding_size": embedding_size,
        "recurrent": {"cell": cell, "hidden_size": hidden_size // 2, "bidirectional": True, **recurrent},
    }
    decoder = {
        "vocab_size": vocab_size,
        "embedding_size": embedding_size,
        "recurrent": {
            "cell": cell,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "residual": residual,
            **recurrent,
        },
        "attention": attention,
        "attention_from": attention_from,
        "attention_gate": attention_gate,
        "tie_embeddings": tie_embeddings,
    }
    model = make_model(seed, scale, architecture="generator", encoder=encoder, decoder=decoder)
    assert isinstance(model, SequenceGenerator)
    return model


def make_first_looking(seed: int = 0, **fields: Any) -> SequenceGenerator:
    """A translator whose first layer looks, and whose layers above read what it saw."""
    fields = {"attention": "additive", "num_layers": 3, "attention_from": "first", "attention_gate": True, **fields}
    return make_translator(seed, **fields)
