"""A captured stepper against the plain one, with a graph that is none: what is copied where, and when."""

import logging
import random
from collections.abc import Callable

import pytest
import torch

from seqmodels import captured
from seqmodels.captured import CapturedStepper, Work
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.models import SequenceGenerator
from seqmodels.state import Memory
from seqmodels.stepper import Ensemble, Features, Group, Stepper
from tests.seqmodels.builders import make_first_looking, make_language_model, make_translator
from tests.seqmodels.gpu import Both, PretendCapture, run_busily
from tests.seqmodels.test_engine import random_request

MODELS: dict[str, Callable[[], SequenceGenerator]] = {
    "LSTM, general": lambda: make_translator(1),
    "GRU, additive": lambda: make_translator(2, attention="additive", cell="gru"),
    "normalised LSTM, zoneout": lambda: make_translator(6, layer_norm=True, zoneout=0.1, cell_zoneout=0.4),
    "minGRU": lambda: make_translator(7, cell="min_gru"),
    "two layers, dot": lambda: make_translator(3, attention="dot", num_layers=2),
    "no attention": lambda: make_translator(4, attention="none"),
    "looks from the first layer": lambda: make_first_looking(5),
    "language model": lambda: make_language_model(5, vocab_size=40, hidden_size=16),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("steps_before", "max_graphs"), [(0, 1000), (2, 3)])
def test_each_step_of_a_busy_engine(name: str, steps_before: int, max_graphs: int) -> None:
    """Random requests in several lanes, joining and leaving; every step compared."""
    choose, capture, plain = random.Random(0), PretendCapture(), Stepper(MODELS[name]())
    stepper = CapturedStepper(plain, capture, steps_before, max_graphs)
    model = Both(plain, stepper)
    for i in range(12):
        # Many requests, so that some lengths and widths stay while their company changes.
        requests = [
            random_request(choose, str(k), model, longest=40 if i % 2 else 9) for k in range(choose.randint(5, 25))
        ]
        run_busily(choose, Engine(model, max_rows=choose.choice([8, 20, 60])), requests)
    assert capture.replays > 0.2 * model.steps
    assert stepper.num_graphs <= max_graphs
    if steps_before == 0:
        assert capture.replays == model.steps and capture.captures < 0.9 * model.steps


def test_answers_are_those_of_the_plain_stepper() -> None:
    model, choose = make_translator(1), random.Random(1)
    requests = [random_request(choose, str(i), model) for i in range(40)]
    stepper = CapturedStepper(Stepper(model), PretendCapture(), steps_before=0)
    for one, two in zip(generate(model, requests), generate(stepper, requests), strict=True):
        assert [h.tokens for h in one] == [h.tokens for h in two]
        for h, g in zip(one, two, strict=True):
            assert g.logprobs == pytest.approx(h.logprobs, abs=1e-5)
            assert [alternatives[0][0] for alternatives in h.top_logprobs or []] == [
                alternatives[0][0] for alternatives in g.top_logprobs or []
            ]


def test_an_ensemble_of_captured_ones() -> None:
    members = [Stepper(make_translator(1)), Stepper(make_translator(2, cell="gru", hidden_size=24))]
    capture = PretendCapture()
    model = Both(Ensemble(members), Ensemble([CapturedStepper(member, capture, 0) for member in members]))
    choose = random.Random(2)
    run_busily(choose, Engine(model, max_rows=30), [random_request(choose, str(i), model) for i in range(40)])
    assert capture.replays == 2 * model.steps


def test_a_memory_is_copied_only_when_requests_join_or_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    fill = captured._StaticMemory.fill
    select = Memory.select

    def counting(static: captured._StaticMemory, memory: Memory, requests: torch.Tensor) -> None:
        monkeypatch.setattr(Memory, "select", lambda self, rows: copied.append(1) or select(self, rows))
        fill(static, memory, requests)
        monkeypatch.setattr(Memory, "select", select)

    monkeypatch.setattr(captured._StaticMemory, "fill", counting)
    engine = Engine(CapturedStepper(Stepper(make_translator(1)), PretendCapture(), 0))
    params = SearchParams(max_new_tokens=20, min_new_tokens=20, num_beams=2)
    for name in "abc":
        engine.submit(Request(name, torch.arange(5), params))
    for _ in range(10):
        engine.step()
    assert len(copied) == 1
    engine.submit(Request("d", torch.arange(9), params))
    for _ in range(5):
        engine.step()
    assert len(copied) == 2


def test_a_newcomer_in_the_place_of_one_that_left_is_seen() -> None:
    """It is written into the lane's memory in place: the same tensors, of the same shape."""
    plain = Stepper(make_translator(1))
    engine = Engine(model := Both(plain, CapturedStepper(plain, PretendCapture(), 0)))
    for i, length in enumerate((6, 20, 20)):
        engine.submit(
            Request(str(i), torch.arange(i, i + 9), SearchParams(max_new_tokens=length, min_new_tokens=length))
        )
    for i in range(5, 20):
        engine.submit(Request(str(i), torch.arange(i, i + 9), SearchParams(max_new_tokens=3, min_new_tokens=3)))
        for _ in range(3):
            engine.step()
    while engine.has_work:
        engine.step()
    assert model.steps > 40


class BrokenCapture:
    """Fails at the second capture."""

    def __init__(self) -> None:
        self._pretend = PretendCapture()

    def __call__(self, work: Work) -> tuple[Features, Callable[[], object]]:
        if self._pretend.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._pretend(work)


def test_what_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    plain, choose = Stepper(make_translator(1)), random.Random(4)
    stepper = CapturedStepper(plain, BrokenCapture(), 0)
    model = Both(plain, stepper)
    with caplog.at_level(logging.WARNING):
        run_busily(choose, Engine(model), [random_request(choose, str(i), model) for i in range(20)])
    (line,) = caplog.messages
    assert "CUDA graphs are off" in line and "not permitted" in line
    assert stepper.num_graphs == 0


def test_graphs_are_few_and_memories_go_with_them() -> None:
    plain, capture = Stepper(make_translator(1)), PretendCapture()
    stepper = CapturedStepper(plain, capture, steps_before=1, max_graphs=2)
    memory = plain.encode(torch.arange(12).repeat(4, 1), torch.full((4,), 12))
    for width in (1, 2, 3, 1, 3, 3):
        rows = 4 * width
        state = plain.start(memory.select(torch.arange(4).repeat_interleave(width)), rows)
        for _ in range(2):
            stepper.step(torch.arange(rows), state, [Group(4, width, memory)])
    assert (capture.captures, capture.replays, stepper.num_graphs) == (4, 8, 2)  # of 1 2 3 1; then 3 has its graph
    assert len(stepper._memories) == 1  # of one shape, whatever the width
    stepper._graphs.clear()
    assert len(stepper._memories) == 0


def test_shapes_are_few() -> None:
    assert [captured._padded(n) for n in (1, 2, 3, 5, 33, 64, 65, 200, 512)] == [1, 2, 4, 8, 64, 64, 128, 256, 512]


def test_a_cpu_captures_nothing() -> None:
    stepper = Stepper(make_translator(1))
    assert captured.captured(stepper) is stepper


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(make_translator(1))
    stepper.device = torch.device("cuda", 0)
    monkeypatch.setattr(captured, "CudaCapture", lambda device: PretendCapture())
    assert captured.captured(stepper) is stepper
    monkeypatch.setenv("SEQMODELS_CUDA_GRAPHS", "1")
    assert isinstance(captured.captured(stepper), CapturedStepper)
