"""The same answers on a CUDA device: tokens equal to the CPU's, log-probabilities close. Skipped without one."""

import random

import pytest
import torch

from seqmodels.decoding.generate import generate
from seqmodels.models import Model
from seqmodels.pipeline import Pipeline
from tests.golden.make import HERE, INPUTS
from tests.seqmodels.builders import make_translator
from tests.seqmodels.test_engine import random_request

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive"])
def test_generation_agrees_with_the_cpu(cell: str, attention: str) -> None:
    model = make_translator(1, cell=cell, attention=attention, num_layers=2)
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


def test_gradients_agree_with_the_cpu() -> None:
    model = make_translator(2)
    labels, inputs = torch.randint(4, 40, (8, 7)), torch.randint(4, 40, (8, 9))
    batch = {"labels": labels, "label_lengths": torch.full((8,), 7), "inputs": inputs, "lengths": torch.arange(2, 10)}
    here = gradients(model, batch)
    there = gradients(model.cuda(), {name: tensor.cuda() for name, tensor in batch.items()})
    for one, two in zip(here, there, strict=True):
        assert torch.allclose(one, two.cpu(), atol=1e-4, rtol=1e-3)


def gradients(model: Model, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.train()
    return list(torch.autograd.grad(model(**batch).loss, list(model.parameters())))
