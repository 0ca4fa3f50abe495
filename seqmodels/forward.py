"""One forward pass for whoever waits: labels of classifiers and taggers, scores of given texts.

The engine's sibling for work that is done in a single step, with the same calls: submit, step, cancel, has_work.
Synchronous; knows tensors; knows no thread, no text and no HTTP.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from seqmodels.config import Average
from seqmodels.decoding.best import best_candidates
from seqmodels.decoding.padding import ROW_FLOOR, bucket, grouped, has_steps, pad_inputs
from seqmodels.decoding.request import Event, Failed, Finished, Scored
from seqmodels.decoding.waiting import Waiting
from seqmodels.ensemble import Mean, mean_of
from seqmodels.errors import DeadlineError
from seqmodels.kernels import packed
from seqmodels.models import Model, SequenceClassifier, SequenceGenerator, SequenceTagger, chosen

TOO_LATE = "the deadline passed before the answer was ready"


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """inputs: as in `engine.Request`. labels: BOS ... EOS of the text to score, for generators only. positions: at
    which steps a tagger's labels are asked for; at all of them where left out. top_logprobs: how many of the likeliest
    tokens are told at each place of a text to score. deadline, priority, client: as in `engine.Request`.

    Its result is a tensor: probabilities (C,) of a classifier, (C, 2) where several labels may be right, (S, C) of a
    tagger; the numbers (K,) of a regression; log-probabilities (T,) of labels. With top_logprobs it is Scored.
    """

    id: str
    inputs: Tensor | None
    labels: tuple[int, ...] = ()
    deadline: float | None = None
    positions: tuple[int, ...] | None = None
    top_logprobs: int = 0
    priority: int = 0
    client: str = ""


class Forward:
    """Answers waiting requests in batches of one padded length, in the order of `waiting.py`: clients take turns by the
    positions that a step gives them. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        models: Model | Sequence[Model],
        max_positions: int = 8192,
        row_floor: int = ROW_FLOOR,
        average: Average = "probability",
    ) -> None:
        """models: one, or the members of an ensemble, whose predictions are averaged as `average` says.
        max_positions: input positions in one batch, padding included."""
        members = models if isinstance(models, Sequence) else [models]
        self._models = [cast(Model, packed(member)) for member in members]
        self._average = average
        self._max_positions = max_positions
        self._row_floor = row_floor
        self._device = next(members[0].parameters()).device
        self._waiting: Waiting[ForwardRequest] = Waiting()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: ForwardRequest) -> None:
        self._waiting.add(request)

    def cancel(self, request_id: str) -> None:
        self._waiting.remove(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Answer as many of those who wait as one budget of positions holds."""
        late = self._waiting.expired(time.monotonic())
        events: list[Event] = [Failed(request.id, DeadlineError(TOO_LATE)) for request in late]
        taken = self._take()
        for group in grouped(taken, _shape):
            events += [
                Finished(request.id, result) for request, result in zip(group, self._answers(group), strict=True)
            ]
        return events

    def _take(self) -> list[ForwardRequest]:
        taken: list[ForwardRequest] = []
        positions_of: Counter[str] = Counter()  # by client
        while request := self._waiting.head(positions_of):
            positions = _positions(request)
            if taken and positions_of.total() + positions > self._max_positions:
                break
            self._waiting.take(request)
            positions_of[request.client] += positions
            taken.append(request)
        return taken

    def _answers(self, group: Sequence[ForwardRequest]) -> Sequence[Tensor | Scored]:
        """Requests of one shape, padded with copies of the first so that none gets other bits when it comes alone."""
        padded = [*group, *[group[0]] * (self._row_floor - len(group))]
        inputs, lengths = None, None
        if padded[0].inputs is not None:
            inputs, lengths = pad_inputs([r.inputs for r in padded if r.inputs is not None], self._device)
        if isinstance(self._models[0], SequenceGenerator):
            labels, label_lengths = pad_inputs([torch.tensor(r.labels) for r in padded], self._device)
            assert label_lengths is not None
            scores = self._scores(labels, inputs, lengths)
            logprobs = chosen(scores, labels, label_lengths).cpu()
            return [
                _scored(logprobs[row, : len(request.labels) - 1], scores[row], request.top_logprobs)
                for row, request in enumerate(group)
            ]
        assert inputs is not None
        answers = self._predictions(inputs, lengths, _labelled(padded, inputs)).cpu()
        if isinstance(self._models[0], SequenceClassifier):
            return list(answers[: len(group)])
        return [answers[row, : _length(request)] for row, request in enumerate(group)]

    def _scores(self, labels: Tensor, inputs: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The log-probability of every token at each place of labels (B, T+1): (B, T, V)."""
        mean = Mean(self._average)
        for model in self._models:
            assert isinstance(model, SequenceGenerator)
            mean.add(model.predict(labels, inputs, lengths))
        return mean.logprobs

    def _predictions(self, inputs: Tensor, lengths: Tensor | None, labelled: Tensor | None) -> Tensor:
        """Probabilities of labels, (B, C) or (B, C, 2) of classifiers, (B, S, C) of taggers; a regression's numbers."""
        logits = [_logits(model, inputs, lengths, labelled) for model in self._models]
        if self._models[0].config.problem_type == "regression":
            return mean_of(logits)
        if len(logits) == 1:
            return logits[0].softmax(-1)
        mean = Mean(self._average)
        for one in logits:
            mean.add(one.log_softmax(-1))
        return mean.logprobs.exp()


def _scored(logprobs: Tensor, scores: Tensor, count: int) -> Tensor | Scored:
    """logprobs (T,) of a text; scores of every token at its places, and at those of padding (T', V). count: how many of
    the likeliest are asked for."""
    if not count:
        return logprobs
    each = scores[: len(logprobs), None]
    values, tokens = best_candidates(each.new_zeros(len(each), 1), each, count)
    return Scored(logprobs, tokens[:, :count].cpu(), values[:, :count].cpu())


def _logits(model: Model, inputs: Tensor, lengths: Tensor | None, labelled: Tensor | None) -> Tensor:
    if isinstance(model, SequenceTagger):
        return model.predict(inputs, lengths, labelled=labelled)[0].float()
    assert isinstance(model, SequenceClassifier)
    return model.predict(inputs, lengths)[0].float()


def _labelled(requests: Sequence[ForwardRequest], inputs: Tensor) -> Tensor | None:
    """At which positions a tagger's labels are asked for (B, S); None where the inputs have no steps."""
    if not has_steps(inputs[0]):
        return None
    labelled = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    for row, request in zip(labelled, requests, strict=True):
        row[: _length(request)] = request.positions is None
        row[list(request.positions or ())] = True
    return labelled.to(inputs.device)


def _length(request: ForwardRequest) -> int:
    return len(request.inputs) if request.inputs is not None and has_steps(request.inputs) else 1


def _shape(request: ForwardRequest) -> tuple[int, int]:
    """Padded lengths of inputs and of labels; together, what decides the shapes that a request sees."""
    return bucket(_length(request)), bucket(len(request.labels)) if request.labels else 0


def _positions(request: ForwardRequest) -> int:
    return sum(_shape(request))
