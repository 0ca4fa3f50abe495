"""Sources are encoded in few calls, some ahead of their turn, and nobody gets another's."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.decoding import sources as sources_module
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.padding import reading_cost
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished, Request
from seqmodels.decoding.waiting import Waiting
from seqmodels.errors import InputError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Stepper
from tests.seqmodels.builders import make_model, make_translator

PARAMS = SearchParams(num_beams=2, max_new_tokens=4)


class Counting(Stepper):
    """Remembers the shape of each call of the encoder."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[tuple[int, int]] = []

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> Any:
        self.calls.append((inputs.shape[0], inputs.shape[1]))
        return super().encode(inputs, lengths)


def sources(count: int, length: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 40, (length,), generator=generator) for _ in range(count)]


def finish(engine: Engine) -> dict[str, Any]:
    answers = {}
    while engine.has_work:
        answers |= {event.request_id: event.result for event in engine.step() if isinstance(event, Finished)}
    return answers


def test_a_queue_is_encoded_in_few_calls() -> None:
    """40 requests, of which two run at a time: 16 sources a call, and the answers of each alone."""
    stepper = Counting(make_translator(1))
    requests = [Request(str(i), source, PARAMS) for i, source in enumerate(sources(40))]
    engine = Engine(stepper, max_rows=4)
    for request in requests:
        engine.submit(request)
    answers = finish(engine)
    assert [rows for rows, _ in stepper.calls] == [16, 16, 8]
    assert [answers[r.id] for r in requests] == [generate(stepper, [r])[0] for r in requests]


def test_long_sources_are_not_read_ahead() -> None:
    stepper = Counting(make_translator(1))
    engine = Engine(stepper, max_rows=2, row_floor=1)
    for i, source in enumerate(sources(3, length=400)):
        engine.submit(Request(str(i), source, PARAMS))
    finish(engine)
    assert stepper.calls == [(1, 512)] * 3


@pytest.mark.parametrize(("positions", "rows"), [(12, 1), (40, 3), (4096, 16)])
def test_what_is_read_ahead_keeps_to_the_budget_of_a_turn(positions: int, rows: int) -> None:
    stepper = Counting(make_translator(1))
    engine = Engine(stepper, max_rows=2, max_positions_per_step=positions, row_floor=1)
    for i, source in enumerate(sources(20)):
        engine.submit(Request(str(i), source, PARAMS))
    engine.step()
    assert stepper.calls == [(rows, 12)]


def test_what_waits_keeps_no_other_row_in_memory() -> None:
    stepper = Stepper(make_translator(1))
    first, *others = (Request(str(i), source, PARAMS) for i, source in enumerate(sources(16)))
    encoder = sources_module.Sources(stepper, row_floor=1)
    encoder.encode([first], others, 4096)
    assert len(encoder) == 15
    for waiting in encoder._ahead.values():
        for tensor in (waiting.state.values, *vars(waiting.memory).values()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(("limit", "held"), [({"MAX_AHEAD": 5}, 5), ({"MAX_POSITIONS_AHEAD": 100}, 3)])
def test_few_wait_encoded(monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], held: int) -> None:
    """Sources whose memories have 32 positions, with the padding of their lane."""
    for name, value in limit.items():
        monkeypatch.setattr(sources_module, name, value)
    engine = Engine(Counting(make_translator(1)), max_rows=2)
    for i, source in enumerate(sources(20)):
        engine.submit(Request(str(i), source, PARAMS))
    engine.step()
    assert len(engine._sources) == held


def test_those_who_leave_the_queue_leave_nothing_behind() -> None:
    engine = Engine(Counting(make_translator(1)), max_rows=2)
    late = time.monotonic() + 3600
    for i, source in enumerate(sources(10)):
        engine.submit(Request(str(i), source, PARAMS, deadline=late if i % 2 else None))
    engine.step()
    assert len(engine._sources) == 9
    for i in range(5):
        engine.cancel(str(i))
    finish(engine)
    assert len(engine._sources) == 0 and engine.num_rows == 0


def test_expired_requests_leave_nothing_behind() -> None:
    engine = Engine(Counting(make_translator(1)), max_rows=2)
    soon = time.monotonic() + 0.05
    engine.submit(Request("first", sources(1)[0], PARAMS))
    for i, source in enumerate(sources(5)):
        engine.submit(Request(str(i), source, PARAMS, deadline=soon))
    engine.step()
    time.sleep(0.06)
    engine.step()
    assert len(engine._sources) == 0


def test_requests_of_one_name_get_each_its_own_answer() -> None:
    """A name that is in use twice is a client's mistake, and must not give one the other's source."""
    one, two = sources(2)
    model = make_translator(1, scale=2.5)
    engine = Engine(model, max_rows=2)
    engine.submit(Request("other", sources(3)[2], PARAMS))
    engine.submit(Request("x", one, PARAMS))
    engine.step()  # reads `one` ahead
    engine.submit(Request("x", two, PARAMS, priority=5))
    results = []
    while engine.has_work:
        results += [event.result for event in engine.step() if isinstance(event, Finished) and event.request_id == "x"]
    alone = [generate(model, [Request("x", source, PARAMS)])[0] for source in (two, one)]
    assert results == alone and alone[0] != alone[1]


def test_those_near_the_front_come_first() -> None:
    waiting: Waiting[Request] = Waiting()
    for i in range(300):
        waiting.add(Request(f"low {i}", None, PARAMS, client="a"))
    waiting.add(Request("busy", None, PARAMS, priority=1, client="busy"))
    waiting.add(Request("idle", None, PARAMS, priority=1, client="idle"))
    assert [r.id for r in waiting.near_the_front({"busy": 4})][:3] == ["idle", "busy", "low 0"]


def test_a_shortlist_without_words_is_refused() -> None:
    engine = Engine(make_translator(1))
    with pytest.raises(InputError, match="shortlist holds no word"):
        engine.submit(Request("a", sources(1)[0], PARAMS, shortlist=torch.tensor([3])))


def test_pictures_cost_as_much_as_they_take() -> None:
    """48 positions each of 3 x 64 x 64: a budget of 100 lets two in, where a few hundred tokens' worth would fit."""
    assert reading_cost(torch.zeros(3, 224, 224)) == 588 and reading_cost(torch.zeros(10, 3, 64, 64)) == 480
    assert reading_cost(torch.zeros(20, 5)) == 24 and reading_cost(torch.zeros(3)) == 12 and reading_cost(None) == 0
    encoder = {"input": "image", "backbone": {"image_size": [64, 64], "channels": [4]}}
    decoder = {"vocab_size": 20, "embedding_size": 8, "recurrent": {"hidden_size": 8}, "attention": "general"}
    captioner = make_model(architecture="generator", encoder=encoder, decoder=decoder)
    assert isinstance(captioner, SequenceGenerator)
    engine = Engine(Stepper(captioner), max_positions_per_step=100)
    classifier = make_model(architecture="classifier", encoder=encoder, labels=["a", "b"])
    forward = Forward(classifier, max_positions=100)
    texts = [Request(str(i), torch.rand(3, 64, 64), PARAMS) for i in range(5)]
    labels = [ForwardRequest(str(i), torch.rand(3, 64, 64)) for i in range(5)]
    for system, requests in ((engine, texts), (forward, labels)):
        for request in requests:
            system.submit(request)  # type: ignore[arg-type]
        for turn in (2, 4, 5):
            system.step()
            assert sum(request.times.admitted is not None for request in requests) == turn


def test_nothing_is_kept_of_what_was_read_before_an_error() -> None:
    stepper = Counting(make_translator(1))
    engine, encode = Engine(stepper), stepper.encode

    def fails_on_long_ones(inputs: Tensor, lengths: Tensor | None) -> Any:
        if inputs.shape[1] > 12:
            raise RuntimeError("out of memory")
        return encode(inputs, lengths)

    stepper.encode = fails_on_long_ones  # type: ignore[method-assign]
    for name, length in (("short", 5), ("long", 50)):
        engine.submit(Request(name, torch.full((length,), 4), PARAMS))
    with pytest.raises(RuntimeError):
        engine.step()
    for name in ("short", "long"):
        engine.cancel(name)
    assert not engine.has_work and len(engine._sources) == 0
