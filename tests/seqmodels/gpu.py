"""What is asked of a GPU, and of a CPU with something that stands in for it: captured steps, 16 bits."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from seqmodels.captured import Work
from seqmodels.config import Weights
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.request import Request
from seqmodels.models import SequenceGenerator
from seqmodels.state import State
from seqmodels.stepper import Decodes, Features, Group, Groups, Stepped, Stepper


class PretendCapture:
    """A capture on a CPU: its graph calls the work again, and writes the results to where the first were.

    As on a GPU nothing is there before the first replay, and each replay writes over what the last one gave.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Work) -> tuple[Features, Callable[[], object]]:
        self.captures += 1
        results = work()
        places = _tensors(results)

        def replay() -> None:
            self.replays += 1
            for place, new in zip(places, _tensors(work()), strict=True):
                place.copy_(new)

        for place in places:
            place.fill_(torch.nan)
        return results, replay


def _tensors(features: Features) -> list[Tensor]:
    outputs, state, weights = features
    return [outputs, state.values, *weights]


class Both:
    """Decodes with the plain model, and compares what the captured one gives for each step."""

    def __init__(self, plain: Decodes, captured: Decodes, atol: float = 1e-5) -> None:
        self.config, self.device, self.vocab_size = plain.config, plain.device, plain.vocab_size
        self.attends, self.output_attentions = plain.attends, plain.output_attentions
        self.reads_memory, self.state_width = plain.reads_memory, plain.state_width
        self.output_size = plain.output_size
        self.encode, self.start, self.shorten, self.read = plain.encode, plain.start, plain.shorten, plain.read
        self._plain, self._captured, self._atol = plain, captured, atol
        self.steps = 0

    def step(self, tokens: Tensor, state: State, groups: Groups) -> Stepped:
        self.steps += 1
        logits, after, weights = self._plain.step(tokens, state, groups)
        given = self._captured.step(tokens, state, groups)
        rows = sum(group.num_requests * group.width for group in groups)
        assert given[1].values.shape == after.values.shape
        self._compare(given[1].values[:rows], after.values[:rows])
        for one, two in [*zip(given[0], logits, strict=True), *zip(given[2], weights, strict=True)]:
            self._compare(one, two)
        return given

    def _compare(self, one: Tensor, two: Tensor) -> None:
        torch.testing.assert_close(one, two, atol=self._atol, rtol=self._atol)


def run_busily(choose: random.Random, engine: Engine, requests: list[Request]) -> None:
    """Requests arrive a few at a time, and some leave before they are done."""
    waiting, here = list(requests), []
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), choose.choice([0, 0, 1, 1, 3]))):
            engine.submit(waiting[-1])
            here.append(waiting.pop().id)
        if here and choose.random() < 0.05:
            engine.cancel(choose.choice(here))
        engine.step()


def check_16_bits(model: SequenceGenerator, weights: Weights) -> None:
    """Steps of 256 rows, from states that some in float32 led to: log-probabilities within 1e-2, and the same token
    wherever the best is better than the next by more than two such errors."""
    device, tolerance = next(model.parameters()).device, 1e-2
    exact, half = Stepper(model), Stepper(model, weights)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(4, exact.vocab_size, shape).to(device)

    with torch.inference_mode():
        memory = exact.encode(tokens(256, 12), torch.full((256,), 12, device=device))
        state, groups = exact.start(memory, 256), [Group(256, 1, memory)]
        for _ in range(4):
            read = tokens(256)
            (rough,), after, _ = half.step(read, state, groups)
            (logits,), state, _ = exact.step(read, state, groups)
            assert rough.dtype == after.values.dtype == torch.float32
            expected, found = (one[:, 0].log_softmax(-1) for one in (logits, rough))
            assert 0 < (found - expected).abs().max() < tolerance
            best = expected.topk(2).values
            decided = best[:, 0] - best[:, 1] > 2 * tolerance
            assert decided.sum() > 50
            assert torch.equal(found.argmax(-1)[decided], expected.argmax(-1)[decided])
