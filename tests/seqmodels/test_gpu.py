"""The same answers on a CUDA device: tokens equal to the CPU's, log-probabilities close. Skipped without one."""

import logging.handlers
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from seqmodels.captured import CapturedStepper, CudaCapture
from seqmodels.config import Weights
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.models import Model
from seqmodels.pipeline import Pipeline
from seqmodels.stepper import Decodes, Ensemble, Stepper
from tests.golden.make import HERE, INPUTS
from tests.seqmodels.builders import FUSED, RECURRENCES, make_translator
from tests.seqmodels.gpu import Both, check_16_bits, run_busily
from tests.seqmodels.test_captured import MODELS
from tests.seqmodels.test_engine import random_request

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", RECURRENCES)
@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive"])
def test_generation_agrees_with_the_cpu(kind: str, attention: str) -> None:
    model = make_translator(1, attention=attention, num_layers=2, **RECURRENCES[kind])
    choose = random.Random(3)
    requests = [random_request(choose, str(i), model) for i in range(40)]
    here = generate(model, requests)
    there = generate(model.cuda(), requests)
    same = [[h.tokens for h in one] == [h.tokens for h in two] for one, two in zip(here, there, strict=True)]
    assert sum(same) >= 38  # a near tie may fall the other way
    for one, two, equal in zip(here, there, same, strict=True):
        for h, g in zip(one, two, strict=True) if equal else ():
            assert g.logprobs == pytest.approx(h.logprobs, abs=1e-3)


@pytest.mark.parametrize("name", INPUTS)
def test_golden_models_answer_alike(name: str) -> None:
    here, there = Pipeline.from_pretrained(HERE / name), Pipeline.from_pretrained(HERE / name, "cuda")
    for one, two in zip(here(INPUTS[name]), there(INPUTS[name]), strict=True):
        if "tags" in one:
            assert [tag["label"] for tag in one["tags"]] == [tag["label"] for tag in two["tags"]]
        else:
            assert one["sequences"][0]["text"] == two["sequences"][0]["text"]


def make_captured(plain: Stepper, steps_before: int = 0, max_graphs: int = 32) -> CapturedStepper:
    return CapturedStepper(plain, CudaCapture(plain.device), steps_before, max_graphs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_graphs", [4, 1000])
def test_captured_steps_equal_plain_ones(name: str, weights: Weights, max_graphs: int) -> None:
    """Every step of random schedules, of several lanes whose requests join and leave; graphs that come and go."""
    plain, choose = Stepper(MODELS[name]().cuda(), weights), random.Random(0)
    stepper = make_captured(plain, max_graphs=max_graphs)
    model = Both(plain, stepper, atol=1e-4 if weights == "float32" else 2e-2)
    for _ in range(3):
        requests = [random_request(choose, str(i), model) for i in range(20)]
        run_busily(choose, Engine(model, max_rows=40), requests)
    assert stepper.num_graphs > 0, "nothing was captured; the log says why"


def test_captured_answers_equal_plain_ones() -> None:
    model, choose = make_translator(1).cuda(), random.Random(1)
    requests = [random_request(choose, str(i), model) for i in range(40)]
    stepper = make_captured(Stepper(model))
    here, there = generate(model, requests), generate(stepper, requests)
    assert stepper.num_graphs > 0
    same = [[h.tokens for h in one] == [h.tokens for h in two] for one, two in zip(here, there, strict=True)]
    assert sum(same) >= 38  # a near tie may fall the other way
    for one, two, equal in zip(here, there, same, strict=True):
        for h, g in zip(one, two, strict=True) if equal else ():
            assert g.logprobs == pytest.approx(h.logprobs, abs=1e-3)


def test_an_ensemble_of_captured_ones() -> None:
    members = [Stepper(make_translator(seed, cell=cell).cuda()) for seed, cell in ((1, "lstm"), (2, "gru"))]
    model: Decodes = Both(Ensemble(members), Ensemble([make_captured(member) for member in members]), atol=1e-4)
    choose = random.Random(2)
    run_busily(choose, Engine(model, max_rows=40), [random_request(choose, str(i), model) for i in range(20)])


class Unwilling(Stepper):
    """Asks the GPU for a number while it is captured, which is not allowed."""

    def features(self, *given):  # type: ignore[no-untyped-def]
        result = super().features(*given)
        if torch.cuda.is_current_stream_capturing():
            result[0].sum().item()
        return result


def failed_capture() -> list[str]:
    """What is logged when a capture fails; everything else is as it was."""
    lines = logging.handlers.BufferingHandler(100)
    logging.getLogger("seqmodels").addHandler(lines)
    plain, choose, before = Unwilling(make_translator(1).cuda()), random.Random(3), torch.cuda.current_stream()
    stepper = make_captured(plain)
    model = Both(Stepper(plain._model), stepper, atol=1e-4)
    run_busily(choose, Engine(model, max_rows=40), [random_request(choose, str(i), model) for i in range(20)])
    assert stepper.num_graphs == 0 and torch.cuda.current_stream() == before
    return [record.getMessage() for record in lines.buffer]


def test_a_capture_that_fails_leaves_everything_as_it_was() -> None:
    """In a process of its own, since after such a failure torch 2.11 draws no more numbers on the GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        lines = process.submit(failed_capture).result()
    assert len([line for line in lines if "CUDA graphs are off" in line]) == 1


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_16_bits_choose_as_float32_does(weights: Weights, cell: str) -> None:
    check_16_bits(make_translator(1, cell=cell, vocab_size=500, hidden_size=64, embedding_size=32).cuda(), weights)


@pytest.mark.parametrize("kind", [*FUSED, "normalised LSTM", "min_gru", "min_lstm"])  # zoneout would draw
def test_gradients_agree_with_the_cpu(kind: str) -> None:
    model = make_translator(2, **RECURRENCES[kind])
    labels, inputs = torch.randint(4, 40, (8, 7)), torch.randint(4, 40, (8, 9))
    batch = {"labels": labels, "label_lengths": torch.full((8,), 7), "inputs": inputs, "lengths": torch.arange(2, 10)}
    here = gradients(model, batch)
    there = gradients(model.cuda(), {name: tensor.cuda() for name, tensor in batch.items()})
    for one, two in zip(here, there, strict=True):
        assert torch.allclose(one, two.cpu(), atol=1e-4, rtol=1e-3)


def gradients(model: Model, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.train()
    return list(torch.autograd.grad(model(**batch).loss, list(model.parameters())))
