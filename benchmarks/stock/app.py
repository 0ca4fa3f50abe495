"""What a service is compared with, on the same Ray Serve: an endpoint that does nothing, and the stock recipe.

The stock recipe is that of Ray Serve's documentation for a model that takes batches: `@serve.batch` gathers requests
that came at about the same time, pads them to the longest, and answers all when the last of them has ended. The search
is a plain beam search over the model's own modules, in the padded form that is in every textbook.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.workload import load_generator, read_sources
from seqmodels.models import SequenceGenerator
from seqmodels.tokenizer import BOS, EOS, PAD

NUM_BEAMS = 5
MAX_NEW_TOKENS = 60
WAIT_S = 0.01


@torch.inference_mode()
def padded_beam_search(
    model: SequenceGenerator, sources: Sequence[Tensor], num_beams: int, most: int
) -> list[list[int]]:
    """The tokens of the likeliest output of each source. All rows take every step until the last output has ended.

    An output that has ended keeps its place among the beams, goes on with padding at no cost, and is compared by the
    sum of its log-probabilities.
    """
    lengths = torch.tensor([len(source) for source in sources])
    memory = model.encode(pad_sequence(list(sources), batch_first=True, padding_value=PAD), lengths)
    batch, vocab_size = len(sources), model.decoder.output_matrix.shape[0]
    each = torch.arange(batch).repeat_interleave(num_beams)
    state = model.start(memory, batch).select(each)
    memory = memory.select(each)
    tokens = torch.full((batch * num_beams, 1), BOS)
    scores = torch.tensor([0.0] + [float("-inf")] * (num_beams - 1)).repeat(batch)
    ended = torch.zeros(batch * num_beams, dtype=torch.bool)
    only_padding = torch.full((vocab_size,), float("-inf"))
    only_padding[PAD] = 0.0
    first = torch.arange(batch)[:, None] * num_beams
    for _ in range(most):
        logits, state = model.decoder(tokens[:, -1:], state, memory)
        logprobs = torch.where(ended[:, None], only_padding, logits[:, 0].log_softmax(-1))
        scores, best = (scores[:, None] + logprobs).view(batch, -1).topk(num_beams)
        rows = (first + best // vocab_size).flatten()
        chosen = (best % vocab_size).flatten()
        scores, state = scores.flatten(), state.select(rows)
        tokens = torch.cat([tokens[rows], chosen[:, None]], dim=1)
        ended = ended[rows] | (chosen == EOS)
        if ended.all():
            break
    return [[token for token in row if token not in (BOS, EOS, PAD)] for row in tokens[::num_beams].tolist()]


class Empty:
    async def __call__(self, request: Request) -> Response:
        await request.body()
        return JSONResponse({})


class Stock:
    def __init__(self, directory: str, batch: int) -> None:
        torch.set_num_threads(1)
        self.model, self.pretrained = load_generator(Path(directory))
        self.translate.set_max_batch_size(batch)

    @serve.batch(batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def translate(self, texts: list[str]) -> list[str]:
        sources = read_sources(self.pretrained, texts)
        outputs = padded_beam_search(self.model, sources, NUM_BEAMS, MAX_NEW_TOKENS)
        assert self.pretrained.target_tokenizer is not None
        return [self.pretrained.target_tokenizer.decode(tokens) for tokens in outputs]

    async def __call__(self, request: Request) -> Response:
        body: dict[str, Any] = json.loads(await request.body())
        return JSONResponse({"text": await self.translate(body["inputs"])})


def application(what: str, batch: int) -> Application:
    """Of one replica with one thread, as ours. what: `empty`, or the model directory of the stock recipe."""
    options = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 1}}
    if what == "empty":
        return serve.deployment(Empty, **options).bind()
    return serve.deployment(Stock, **options).bind(str(Path(what).resolve()), batch)
