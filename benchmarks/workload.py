"""What the decoding benchmarks decode, and how a run is counted.

Either a trained model and the sentences of a real data set, or a model of a Multi30k translator's size with random
weights and generated sources. Uses the engine's public interface only, so it counts the same whatever is inside.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Event, Failed, Finished, Request
from seqmodels.decoding.search import Hypothesis
from seqmodels.models import SequenceGenerator
from seqmodels.pretrained import Pretrained, load_pretrained
from seqmodels.reading import Reader

VOCAB_SIZE = 7700


# Models and requests


def make_model() -> SequenceGenerator:
    """One-layer bidirectional LSTM 2 x 256 -> LSTM 512 with attention, random weights."""
    encoder = {
        "input": "text",
        "vocab_size": VOCAB_SIZE,
        "embedding_size": 256,
        "recurrent": {"hidden_size": 256, "bidirectional": True},
    }
    decoder = {
        "vocab_size": VOCAB_SIZE,
        "embedding_size": 256,
        "recurrent": {"hidden_size": 512},
        "attention": "general",
    }
    config = ModelConfig.parse({"architecture": "generator", "encoder": encoder, "decoder": decoder})
    return SequenceGenerator(config).eval()


def make_sources(count: int) -> list[Tensor]:
    """Sources of 5 to 30 tokens, mostly short as in Multi30k: 15 in the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 26, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def load_generator(directory: Path) -> tuple[SequenceGenerator, Pretrained]:
    pretrained = load_pretrained(directory)
    assert isinstance(pretrained.model, SequenceGenerator), f"{directory} holds no generator"
    return pretrained.model, pretrained


def read_sources(pretrained: Pretrained, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of each text, cut where it is too long."""
    reader = Reader(pretrained)
    readings = [reader.read(text, "inputs", truncate=True) for text in texts]
    return [reading.inputs for reading in readings if reading.inputs is not None]


def read_column(path: Path, column: str, split: str) -> list[str]:
    """A column of a data set's split: a folder or a file as `datasets` reads it, or the lines of a .txt file."""
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").splitlines()
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it asks every local README for hub metadata
    if path.is_dir():
        return [str(text) for text in datasets.load_dataset(str(path), split=split)[column]]
    kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
    return [str(text) for text in datasets.load_dataset(kind, data_files=str(path), split="train")[column]]


def make_requests(sources: Sequence[Tensor], params: SearchParams) -> list[Request]:
    return [Request(str(i), source, params) for i, source in enumerate(sources)]


# Runs


@dataclass(frozen=True)
class Run:
    """What a run took and gave. rows: decoder rows advanced in each step, padding not counted."""

    seconds: float
    rows: list[int]
    results: dict[str, Hypothesis]  # the best of each request

    @property
    def tokens(self) -> int:
        """Output tokens of the best hypotheses, EOS counted."""
        return sum(len(best.logprobs) for best in self.results.values())


def run(engine: Engine, requests: Sequence[Request], clock: Callable[[], float] = time.perf_counter) -> Run:
    """Submit all, step until there is no work."""
    rows: list[int] = []
    results: dict[str, Hypothesis] = {}
    width = {request.id: request.params.width for request in requests}
    started = clock()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        done = list(finished(engine.step()))
        results.update(done)
        rows.append(engine.num_rows + sum(width[request_id] for request_id, _ in done))  # those left in this step
    return Run(clock() - started, rows, results)


def finished(events: Sequence[Event]) -> Iterator[tuple[str, Hypothesis]]:
    """The best hypothesis of each request that ended. Raises what one failed with."""
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished) and isinstance(event.result, list):
            yield event.request_id, event.result[0]


def of_length(request: Request, tokens: int) -> Request:
    """The same request, made to take exactly so many steps."""
    fields = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return replace(request, params=request.params.model_copy(update=fields))


def least_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some calls, after one to warm up: what the machine can do where nobody disturbs it."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
