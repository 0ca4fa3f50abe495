"""Language models that go on learning from the text they are scored on: each word is scored before it is learned from.

Dynamic evaluation (Krause et al. 2018) moves the weights after each few words, against the gradient and back towards
where they were. A continuous cache (Grave et al. 2017) remembers where the model stood before each word of late, and
makes words likelier that came when it stood as it does now.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from seqmodels.config import Strict
from seqmodels.losses import Output, labelled
from seqmodels.models import SequenceGenerator
from seqmodels.state import State
from training.data.examples import Example
from training.data.streams import Streams

SEGMENT_LENGTH = 5  # words between two steps of learning
STATISTICS_ROWS, STATISTICS_BATCHES = 100, 2000  # of the training split, for the usual size of each gradient
EPSILON = 1e-3


class Adaptation(Strict):
    """How a language model adapts while it is scored; not at all by default."""

    dynamic_rate: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0  # of learning
    dynamic_decay: NonNegativeFloat = 0.0  # how far each step of learning is followed by a step back
    cache_weight: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.0  # the share of a word's probability that the cache gives
    )
    cache_size: PositiveInt = 500  # words
    cache_flatness: PositiveFloat = 0.3  # theta: how much a likeness of states counts

    @model_validator(mode="after")
    def _check(self) -> Self:
        needs = {"dynamic_decay": "dynamic_rate", "cache_size": "cache_weight", "cache_flatness": "cache_weight"}
        for name, other in needs.items():
            if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, other):
                raise ValueError(f"{name} does nothing without {other}; give both, or neither")
        return self

    @property
    def ways(self) -> list[str]:
        """What it does, in words for a file's name."""
        return [f"{name}={value}" for name, value in self.model_dump(exclude_defaults=True).items()]


class Adaptive:
    """A language model called as one is, `out = model(**batch, state=...)`, on one stream, in its order.

    model is left as it is. train: examples of the training split, for dynamic evaluation alone.
    """

    def __init__(self, model: SequenceGenerator, adaptation: Adaptation, train: Sequence[Example] = ()) -> None:
        self._model, self._adaptation = copy.deepcopy(model), adaptation
        self._learner = _Learner(self._model, adaptation, train) if adaptation.dynamic_rate else None
        self._cache = _Cache(adaptation) if adaptation.cache_weight else None

    @property
    def learns(self) -> bool:
        return self._learner is not None

    @property
    def nll_of_a_guess(self) -> float:
        """Where every token is as likely as any other."""
        return math.log(self._model.decoder.embedding.num_embeddings)

    def __call__(self, labels: Tensor, label_lengths: Tensor, state: State | None = None) -> Output:
        assert len(labels) == 1, "a text is learned from in its order"
        with _learning():
            outputs, logits, targets, after = self._read(labels, label_lengths, state)
            out = labelled(logits, targets)
            if self._learner:
                self._learner.learn(out.loss)
        nll = out.nll
        if self._cache:
            logprobs = logits.detach().float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
            nll = -self._cache.mixed(logprobs, outputs.detach(), targets).mean()
        return Output(nll, nll, out.num_targets, None, after.detach())

    def _read(self, labels: Tensor, label_lengths: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, State]:
        """Of the T real targets: the stack's outputs before each (T, H), logits (T, V), themselves (T,); the State."""
        decoder, count = self._model.decoder, int(label_lengths[0]) - 1
        state = state if state is not None else self._model.start(None, 1)
        outputs, _, _, after = decoder.read(labels[:, :-1], state)
        logits = decoder.project(decoder.features(outputs, None)[0, :count])
        return outputs[0, :count], logits, labels[0, 1 : 1 + count], after


class _Learner:
    """RMS with a decay towards the weights it began with: equations 4 to 6 of the paper, whose gradients' usual sizes
    come from the training split."""

    def __init__(self, model: SequenceGenerator, adaptation: Adaptation, train: Sequence[Example]) -> None:
        self._rate, self._decay = adaptation.dynamic_rate, adaptation.dynamic_decay
        self._parameters = list(model.parameters())
        self._first = [parameter.detach().clone() for parameter in self._parameters]
        self._sizes = _usual_sizes(model, train)
        mean = torch.cat([size.flatten() for size in self._sizes]).mean()
        # Weights that move much are drawn back much, but never beyond where they began.
        self._pulls = [(self._decay * size / mean).clamp(max=1.0) for size in self._sizes]

    def learn(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self._parameters)
        with torch.no_grad():
            for value, gradient, size, first, pull in zip(
                self._parameters, gradients, self._sizes, self._first, self._pulls, strict=True
            ):
                value.add_(pull * (first - value) - self._rate * gradient / (size + EPSILON))


def _usual_sizes(model: SequenceGenerator, train: Sequence[Example]) -> list[Tensor]:
    """The root of the mean square of each weight's gradient over batches of the training split."""
    parameters = list(model.parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    streams, state = Streams(train, STATISTICS_ROWS, SEGMENT_LENGTH), None
    count = min(len(streams), STATISTICS_BATCHES)
    for index in range(count):
        batch = {name: value.to(parameters[0].device) for name, value in streams.batch(0, index).items()}
        with _learning():
            logits, targets, after = model.target_logits(**batch, state=state)
            gradients = torch.autograd.grad(labelled(logits, targets).loss, parameters)
        state = after.detach() if after is not None else None
        for square, gradient in zip(squares, gradients, strict=True):
            square += gradient.square()
    return [(square / count).sqrt() for square in squares]


@contextmanager
def _learning() -> Iterator[None]:
    """Gradients of a model in evaluation mode, without dropout: cuDNN's recurrences have none there, torch's own do."""
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        yield


class _Cache:
    """The last words, and where the model stood before each."""

    def __init__(self, adaptation: Adaptation) -> None:
        self._weight, self._size = adaptation.cache_weight, adaptation.cache_size
        self._flatness = adaptation.cache_flatness
        self._states, self._words = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def mixed(self, logprobs: Tensor, states: Tensor, words: Tensor) -> Tensor:
        """Log-probabilities (T,) of the next T words by the model -> with the cache. states (T, H): before each."""
        old = len(self._words)
        self._states = torch.cat([self._states.view(-1, states.shape[1]).to(states), states])
        self._words = torch.cat([self._words.to(words), words])
        places = torch.arange(len(self._words), device=words.device)
        now = old + torch.arange(len(words), device=words.device)[:, None]
        seen = (places < now) & (places >= now - self._size)  # (T, N)
        likeness = (self._flatness * states @ self._states.T).masked_fill(~seen, float("-inf"))
        same = self._words == words[:, None]
        # -inf where the word has not been seen of late; nothing to go by where no word has been.
        cached = likeness.masked_fill(~same, float("-inf")).logsumexp(1) - likeness.logsumexp(1)
        weight = torch.where(seen.any(1), self._weight, 0.0).to(logprobs)
        self._states, self._words = self._states[-self._size :], self._words[-self._size :]
        return torch.logaddexp((1 - weight).log() + logprobs, weight.log() + cached.nan_to_num(nan=float("-inf")))
