"""Tiny random models of every task, saved as a user would save them. Their answers mean nothing, but stay the same."""

from pathlib import Path
from typing import Any

import torch

from seqmodels.config import ModelConfig
from seqmodels.models import build_model
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import save_pretrained
from seqmodels.tokenizer import Tokenizer

RECURRENT = {"cell": "gru", "hidden_size": 16}
PICTURE = {"image_size": [8, 8], "channels": [4, 8]}


def save_all(directory: Path, bidirectional: bool = False, pooling: str = "last", seed: int = 1) -> dict[str, str]:
    """Name -> a directory for each task and each kind of input. bidirectional: of encoders; pooling: of mood."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train([], kind="byte")
    size = tokenizer.vocab_size
    reading = {**RECURRENT, "bidirectional": bidirectional}
    text = {"input": "text", "vocab_size": size, "embedding_size": 8, "recurrent": reading}
    image = {"input": "image", "backbone": PICTURE}
    frames = {"input": "frames", "backbone": PICTURE, "recurrent": reading}
    features = {"input": "features", "feature_size": 3, "recurrent": reading}
    decoder = {"vocab_size": size, "embedding_size": 8, "recurrent": RECURRENT}
    attending = {**decoder, "attention": "general"}
    configs: dict[str, dict[str, Any]] = {
        "mood": {"architecture": "classifier", "encoder": text, "labels": ["bad", "good"], "pooling": pooling},
        "names": {"architecture": "tagger", "encoder": text, "labels": ["O", "B-NAME", "I-NAME"]},
        "motion": {"architecture": "tagger", "encoder": frames, "labels": ["left", "right"]},
        "series": {"architecture": "classifier", "encoder": features, "labels": ["up", "down"]},
        "en-de": {"architecture": "generator", "encoder": text, "decoder": attending, "max_source_length": 64},
        "describe": {"architecture": "generator", "encoder": image, "decoder": attending},
        "story": {"architecture": "generator", "decoder": decoder},
    }
    several = {"problem_type": "multi_label_classification", "labels": ["art", "sport"]}
    configs["topics"] = {"architecture": "classifier", "encoder": text, **several}
    number = {"problem_type": "regression", "labels": ["stars"], "target_mean": [3.0], "target_std": [1.5]}
    configs["rating"] = {"architecture": "classifier", "encoder": text, **number}
    for name, fields in configs.items():
        config = ModelConfig.parse(fields)
        pictures = config.input in ("image", "frames")
        save_pretrained(
            build_model(config),
            directory / name,
            source_tokenizer=tokenizer if config.input == "text" else None,
            target_tokenizer=tokenizer if config.decoder else None,
            preprocessor=Preprocessor(size=(8, 8)) if pictures else None,
        )
    return {name: str(directory / name) for name in configs}
