"""Does an answer depend on who shares the batch? Asked of each loaded model, on its own shapes.

CPU kernels take another path for a handful of rows, and which handful depends on the machine and the sizes. So the
floor to which rows are padded is found by trying, not assumed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from seqmodels.characters import with_spellings
from seqmodels.config import Average, CharacterConfig, FeatureEncoderConfig, ModelConfig, TextEncoderConfig
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished, Request, Scores
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import Model, SequenceGenerator
from seqmodels.state import State
from seqmodels.stepper import Decodes, Stepper

FLOORS = (4, 8, 16)
LENGTHS = (1, 3, 7, 12, 14, 20)
COPIES = 8  # of each sample request, when all come at once


def find_row_floor(
    models: Model | Sequence[Model], stepper: Decodes | None = None, average: Average = "probability"
) -> int | None:
    """The smallest number of rows from which on answers are the same to the last bit, alone and together.

    models: one, or the members of an ensemble, with their average. stepper: with which a generator will decode (one in
    float32 of the first where left out). None where no floor helps: the model
    still works, but the last digits of its scores may vary with load.
    """
    members = models if isinstance(models, Sequence) else [models]
    for floor in FLOORS:
        if all(_same(alone, together) for alone, together in _answers(members, stepper, floor, average)):
            return floor
    return None


def _answers(
    members: Sequence[Model], stepper: Decodes | None, floor: int, average: Average
) -> list[tuple[object, object]]:
    """Each sample request's answer when it comes alone, and when all come at once."""
    model = members[0]
    forward = _sample_forward(model.config)
    worker = Forward(members, row_floor=floor, average=average)
    pairs = list(zip(_each(worker, forward), _all(worker, forward), strict=True))
    if not any(isinstance(member, SequenceGenerator) or member.config.needs_whole for member in members):
        pieces = _as_pieces(forward, worker.start().width)
        pairs += list(zip(_each(worker, pieces), _all(worker, pieces), strict=True))
    if isinstance(model, SequenceGenerator):
        stepper = stepper or Stepper(model)
        searches = _sample_searches(model.config, stepper.output_attentions)
        engine = Engine(stepper, row_floor=floor, prefix_cache_states=0)  # a shared state would hide bits
        pairs += list(zip(_each(engine, searches), _all(engine, searches), strict=True))
    return pairs


def _each(worker: Engine | Forward, requests: Sequence[Request] | Sequence[ForwardRequest]) -> list[object]:
    return [_all(worker, [request], 1)[0] for request in requests]  # type: ignore[arg-type]


def _all(
    worker: Engine | Forward, requests: Sequence[Request] | Sequence[ForwardRequest], copies: int = COPIES
) -> list[object]:
    """The answers when all come at once, in company of copies of themselves."""
    answers: dict[str, object] = {}
    for copy in range(copies):
        for request in requests:  # the answers kept are those of the last copies, which stand deep in the batch
            named = request if copy == copies - 1 else replace(request, id=f"{request.id} again {copy}")
            worker.submit(named)  # type: ignore[arg-type]  # each worker is given its own kind
    while worker.has_work:
        answers |= {event.request_id: event.result for event in worker.step() if isinstance(event, Finished)}
    return [answers[request.id] for request in requests]


def _same(one: object, two: object) -> bool:
    if isinstance(one, Scores) and isinstance(two, Scores):
        return _same(one.values, two.values) and _same(one.state, two.state)
    if isinstance(one, State) and isinstance(two, State):
        return _same(one.values, two.values)
    return torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two


def _sample_searches(config: ModelConfig, attends: bool) -> list[Request]:
    """Each kind of search with and without its details."""
    searches = (
        SearchParams(max_new_tokens=4, min_new_tokens=3),
        SearchParams(max_new_tokens=4, num_beams=5, num_return_sequences=5, early_stopping=False),
        SearchParams(max_new_tokens=4, do_sample=True, num_return_sequences=2),
    )
    prefixes: tuple[tuple[int, ...], ...] = ((), (3,), (3, 2, 3))
    assert config.decoder is not None
    words = (
        torch.arange(config.decoder.eos_token_id, min(config.decoder.vocab_size, 500))
        if config.input == "text"
        else None
    )
    return [
        Request(
            str(i),
            inputs,
            search if i % 2 else _detailed(search, attends),
            prefix=prefixes[i % 3],
            shortlist=words if i in (0, 1, 5) else None,  # each search once
            seed=i,
        )
        for i, (inputs, search) in enumerate(zip(_sample_inputs(config), searches * 2, strict=True))
    ]


def _detailed(search: SearchParams, attends: bool) -> SearchParams:
    """The same with all that is told beside the tokens, and the penalty that hangs on it."""
    penalty = 0.2 if attends and search.num_beams > 1 else 0.0
    return search.model_copy(update={"top_logprobs": 5, "output_attentions": attends, "coverage_penalty": penalty})


def _sample_forward(config: ModelConfig) -> list[ForwardRequest]:
    labels = (2, 3, 2, 3) if config.decoder else ()
    return [
        ForwardRequest(str(i), inputs, labels[: 2 + i % 3], positions=_sample_positions(config, inputs))
        for i, inputs in enumerate(_sample_inputs(config))
    ]


def _as_pieces(requests: Sequence[ForwardRequest], width: int) -> list[ForwardRequest]:
    """Each third goes on from a state, each third is to leave one, and the rest do both; among whole inputs."""
    states = torch.rand(len(requests), 1, width, generator=torch.Generator().manual_seed(0))
    pieces = [
        replace(
            request,
            id=f"{request.id} as a piece",
            state=State(states[i]) if i % 3 != 1 else None,
            return_state=i % 3 != 2,
        )
        for i, request in enumerate(requests)
    ]
    return [*requests, *pieces]


def _sample_positions(config: ModelConfig, inputs: Tensor | None) -> tuple[int, ...] | None:
    """Of a tagger that reads text, every other step, as where words are of two pieces."""
    if config.architecture != "tagger" or inputs is None:
        return None
    return tuple(range(len(inputs)))[:: 2 if config.input == "text" else 1]


def _sample_inputs(config: ModelConfig) -> list[Tensor | None]:
    """Inputs of several lengths, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    encoder = config.encoder
    if encoder is None:
        return [None] * len(LENGTHS)
    if isinstance(encoder, TextEncoderConfig):
        tokens = [torch.randint(0, encoder.vocab_size, (length,), generator=generator) for length in LENGTHS]
        return [_spelt(ids, encoder.characters) if encoder.characters else ids for ids in tokens]
    if isinstance(encoder, FeatureEncoderConfig):
        return [torch.randn(length, encoder.feature_size, generator=generator) for length in LENGTHS]
    picture = (encoder.backbone.in_channels, *encoder.backbone.image_size)
    if config.input == "image":
        return [torch.randn(*picture, generator=generator) for _ in LENGTHS]
    return [torch.randn(length, *picture, generator=generator) for length in LENGTHS]


def _spelt(ids: Tensor, characters: CharacterConfig) -> Tensor:
    """Tokens as words of several lengths, spelt with their own ids."""
    words = [str(i) * (1 + i % characters.max_length) for i in ids.tolist()]
    return with_spellings(ids.tolist(), range(len(ids)), words, characters.max_length)
