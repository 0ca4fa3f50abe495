"""Small random models for tests."""

from typing import Any

import torch

from seqmodels.config import ModelConfig
from seqmodels.models import Model, SequenceGenerator, build_model


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
    tie_embeddings: bool = False,
) -> SequenceGenerator:  # fmt: skip
    encoder = {
        "input": "text",
        "vocab_size": vocab_size,
        "embedding_size": embedding_size,
        "recurrent": {"cell": cell, "hidden_size": hidden_size // 2, "bidirectional": True},
    }
    decoder = {
        "vocab_size": vocab_size,
        "embedding_size": embedding_size,
        "recurrent": {"cell": cell, "hidden_size": hidden_size, "num_layers": num_layers, "residual": residual},
        "attention": attention,
        "tie_embeddings": tie_embeddings,
    }
    model = make_model(seed, scale, architecture="generator", encoder=encoder, decoder=decoder)
    assert isinstance(model, SequenceGenerator)
    return model
