"""One forward pass for whoever waits: labels of classifiers and taggers, scores of given texts.

The engine's sibling for work that is done in a single step, with the same calls: submit, step, cancel, has_work.
Synchronous; knows tensors; knows no thread, no text and no HTTP.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from seqmodels.config import Average
from seqmodels.decoding.best import best_candidates
from seqmodels.decoding.padding import ROW_FLOOR, bucket, grouped, has_steps, pad_inputs, reading_cost
from seqmodels.decoding.request import Event, Failed, Finished, Scores, Times
from seqmodels.decoding.waiting import Waiting
from seqmodels.ensemble import Mean, mean_of
from seqmodels.errors import DeadlineError
from seqmodels.kernels import packed
from seqmodels.models import Labeller, Model, SequenceClassifier, SequenceGenerator, SequenceTagger, chosen
from seqmodels.state import State

TOO_LATE = "the deadline passed before the answer was ready"


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """inputs: as in `engine.Request`. labels: BOS ... EOS of the text to score, for generators only. positions: at
    which steps a tagger's labels are asked for; at all of them where left out. state: one row, after what came before
    these inputs of classifiers and taggers, as `Forward.start` or a result has it. return_state: whether the result
    comes with the one after them. top_logprobs: how many of the likeliest tokens are told at each place of a text to
    score. deadline, priority, client, times: as in `engine.Request`.

    The values of its result: probabilities (C,) of a classifier, (C, 2) where several labels may be right, (S, C) of a
    tagger; the numbers (K,) of a regression; log-probabilities (T,) of labels.
    """

    id: str
    inputs: Tensor | None
    labels: tuple[int, ...] = ()
    deadline: float | None = None
    positions: tuple[int, ...] | None = None
    state: State | None = None
    return_state: bool = False
    top_logprobs: int = 0
    priority: int = 0
    client: str = ""
    times: Times = field(default_factory=Times)


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

    def start(self) -> State:
        """Of models that read an input in pieces, what it begins from: one row, the members' columns side by side.
        Raises UnsupportedError of others."""
        return State(torch.cat([state.values for state in self._starts()], dim=1))

    def _starts(self) -> list[State]:
        return [model.start(1) for model in self._models if isinstance(model, Labeller)]

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting(self) -> dict[tuple[int, str], list[float]]:
        """The deadlines of those that wait, by priority and client."""
        return self._waiting.deadlines()

    def submit(self, request: ForwardRequest) -> None:
        request.times.submitted = time.monotonic()
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
            results = self._answers(group)
            now = time.monotonic()
            for request, result in zip(group, results, strict=True):
                request.times.first_token = request.times.finished = now
                events.append(Finished(request.id, result))
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
            request.times.admitted = time.monotonic()
            taken.append(request)
        return taken

    def _answers(self, group: Sequence[ForwardRequest]) -> list[Scores]:
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
        values, states = self._predictions(inputs, lengths, _labelled(padded, inputs), self._states(padded))
        values = values.cpu()
        if isinstance(self._models[0], SequenceTagger):
            own = [values[row, : _length(request)] for row, request in enumerate(group)]
        else:
            own = list(values[: len(group)])
        after = states.to(torch.device("cpu")).split() if states else [None] * len(padded)
        return [
            Scores(one, state if request.return_state else None)
            for request, one, state in zip(group, own, after, strict=False)
        ]

    def _states(self, requests: Sequence[ForwardRequest]) -> State | None:
        """What each row goes on from (B, width); None where none of them is a piece of a longer input."""
        if not any(request.state or request.return_state for request in requests):
            return None
        start = self.start()
        return State(torch.cat([(request.state or start).values.to(self._device) for request in requests]))

    def _scores(self, labels: Tensor, inputs: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The log-probability of every token at each place of labels (B, T+1): (B, T, V)."""
        mean = Mean(self._average)
        for model in self._models:
            assert isinstance(model, SequenceGenerator)
            mean.add(model.predict(labels, inputs, lengths))
        return mean.logprobs

    def _predictions(
        self, inputs: Tensor, lengths: Tensor | None, labelled: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Probabilities of labels, (B, C) or (B, C, 2) of classifiers, (B, S, C) of taggers; a regression's numbers.
        And the members' states after the inputs, side by side, if they are given some."""
        before = self._own(state)
        pairs = [_logits(*each, inputs, lengths, labelled) for each in zip(self._models, before, strict=True)]
        after = [own.values for _, own in pairs if own is not None]
        return self._combined([logits for logits, _ in pairs]), State(torch.cat(after, dim=1)) if after else None

    def _own(self, state: State | None) -> list[State | None]:
        """Each member's columns."""
        if state is None:
            return [None] * len(self._models)
        widths = [start.width for start in self._starts()]
        return [State(values) for values in torch.split(state.values, widths, dim=1)]

    def _combined(self, logits: Sequence[Tensor]) -> Tensor:
        """What the members say together, given what each says."""
        if self._models[0].config.problem_type == "regression":
            return mean_of(logits)
        if len(logits) == 1:
            return logits[0].softmax(-1)
        mean = Mean(self._average)
        for one in logits:
            mean.add(one.log_softmax(-1))
        return mean.logprobs.exp()


def _scored(logprobs: Tensor, scores: Tensor, count: int) -> Scores:
    """logprobs (T,) of a text; scores of every token at its places, and at those of padding (T', V). count: how many of
    the likeliest are asked for."""
    if not count:
        return Scores(logprobs)
    each = scores[: len(logprobs), None]
    values, tokens = best_candidates(each.new_zeros(len(each), 1), each, count)
    return Scores(logprobs, likeliest=(tokens[:, :count].cpu(), values[:, :count].cpu()))


def _logits(
    model: Model, state: State | None, inputs: Tensor, lengths: Tensor | None, labelled: Tensor | None
) -> tuple[Tensor, State | None]:
    if isinstance(model, SequenceTagger):
        logits, after = model.predict(inputs, lengths, state, labelled)
    else:
        assert isinstance(model, SequenceClassifier)
        logits, after = model.predict(inputs, lengths, state)
    return logits.float(), after


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
    return max(sum(_shape(request)), reading_cost(request.inputs))
