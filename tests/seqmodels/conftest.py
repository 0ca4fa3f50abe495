"""What the tests of pipelines share: a small model of each kind with random weights, and how a stream is read."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished, Progress
from seqmodels.pipeline import Pipeline
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import save_pretrained
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model

CORPUS = ["the quick brown fox jumps over the lazy dog", "Ein Hund läuft über die Straße 🙂", "0 1 2 3 4 5 6 7 8 9"]
TOKENIZER = Tokenizer.train(CORPUS * 3, "bpe", vocab_size=320)
STACK = {"hidden_size": 16}
TEXT = {"input": "text", "vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": STACK}
DECODER = {"vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": STACK}
PICTURE = {"image_size": [8, 8], "channels": [4]}
MODELS: dict[str, dict[str, Any]] = {
    "classifier": {"architecture": "classifier", "encoder": TEXT, "labels": ["bad", "good"], "max_source_length": 50},
    "tagger": {"architecture": "tagger", "encoder": TEXT, "labels": ["O", "B-X", "I-X"]},
    "translator": {"architecture": "generator", "encoder": TEXT, "decoder": {**DECODER, "attention": "general"}},
    "language model": {"architecture": "generator", "decoder": DECODER, "max_source_length": 50},
    "captioner": {"architecture": "generator", "encoder": {"input": "image", "backbone": PICTURE}, "decoder": DECODER},
    "attending captioner": {
        "architecture": "generator",
        "encoder": {"input": "image", "backbone": PICTURE},
        "decoder": {
            **DECODER,
            "attention": "additive",
            "attention_from": "first",
            "recurrent": {**STACK, "num_layers": 2},
        },
    },
    "frames": {"architecture": "tagger", "encoder": {"input": "frames", "backbone": PICTURE}, "labels": ["l", "r"]},
    "series": {
        "architecture": "classifier",
        "encoder": {"input": "features", "feature_size": 2, "recurrent": STACK},
        "labels": ["up", "down"],
    },
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        save_pretrained(
            make_model(1, 2.0, **fields),
            root / name,
            source_tokenizer=TOKENIZER,
            target_tokenizer=TOKENIZER,
            preprocessor=Preprocessor(size=(8, 8)),
            generation=SearchParams(max_new_tokens=12),
        )
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="session")
def pipelines(directories: dict[str, Path]) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(path) for name, path in directories.items()}


def png(mode: str = "RGB", size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def stream(
    pipeline: Pipeline, item: Any, state: bytes | None = None, **params: Any
) -> tuple[list[str], dict[str, Any]]:
    job = pipeline.prepare(item, params, stream=True, state=state)
    streamed: dict[int, str] = {}
    text = pipeline.text_stream(job)
    pipeline.submit(job)
    while pipeline.has_work:
        for event in pipeline.step():
            if isinstance(event, Progress):
                deltas = text.push(event)
            else:
                assert isinstance(event, Finished)
                assert isinstance(event.result, list)
                deltas = text.finish(event.result)
                answer = pipeline.render(job, event.result)
            for index, delta, _ in deltas:
                streamed[index] = streamed.get(index, "") + delta
    return [streamed.get(i, "") for i in range(max(streamed, default=-1) + 1)], answer
