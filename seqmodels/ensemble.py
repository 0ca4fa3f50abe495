"""Ensembles: several model directories that answer as one, by the mean of what they predict.

`probability` averages probabilities; `logprob` averages log-probabilities and normalises, which counts a member's doubt
for more. What they mean is the same in a search (`stepper.Ensemble`), in a forward pass (`forward.Forward`) and in an
evaluation (`Averaged`). Knows predictions and what has to be alike; knows no text.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.config import Average, FeatureEncoderConfig
from seqmodels.errors import ConfigError
from seqmodels.losses import Output, labelled, measured
from seqmodels.models import Model, SequenceGenerator
from seqmodels.pretrained import Pretrained, load_pretrained
from seqmodels.state import State

Directories = str | Path | Sequence[str | Path]  # of one model, or of the members of an ensemble


def as_paths(directories: Directories) -> list[Path]:
    """Raises ConfigError where there is none."""
    paths = [Path(directories)] if isinstance(directories, str | Path) else [Path(one) for one in directories]
    if not paths:
        raise ConfigError("an ensemble has no member; give at least one model directory")
    return paths


def load_members(directories: Directories, device: str | torch.device = "cpu") -> list[Pretrained]:
    """Every member of an ensemble, or the one model. Raises ModelDirectoryError, and ConfigError where two members do
    not fit together."""
    paths = as_paths(directories)
    members = [load_pretrained(path, device) for path in paths]
    for path, member in zip(paths[1:], members[1:], strict=True):
        check_fits(paths[0], members[0], path, member)
    return members


def check_fits(first_path: Path, first: Pretrained, path: Path, member: Pretrained) -> None:
    """Raises ConfigError unless both read the same inputs in the same way, and mean the same by their outputs."""
    pairs = zip_longest(_facts(first), _facts(member))
    difference = next(((name, one, two) for (name, one), (_, two) in pairs if one != two), None)
    if difference:
        name, one, two = difference
        raise ConfigError(
            f"{first_path} and {path} cannot answer as one: their {name} differ ({one} and {two}); give models of one "
            "task and data, such as runs of one recipe with another run.seed or other sizes in `model`"
        )


def _facts(pretrained: Pretrained) -> Iterator[tuple[str, object]]:
    """What must be alike in all members, the most telling first."""
    config, encoder = pretrained.config, pretrained.config.encoder
    yield "tasks", config.task
    yield "inputs", config.input
    yield "labels", ", ".join(config.labels)
    yield "problem types", config.problem_type
    yield "lengths of spellings", config.characters and config.characters.max_length
    yield "feature sizes", encoder.feature_size if isinstance(encoder, FeatureEncoderConfig) else None
    for name, tokenizer in (("source", pretrained.source_tokenizer), ("target", pretrained.target_tokenizer)):
        # Compared by content: as many tokens may be other tokens.
        yield f"{name} tokenizers", tokenizer and f"{tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint[:12]}"
    yield "preprocessing of pictures", pretrained.preprocessor


def common_reader(members: Sequence[Pretrained]) -> Pretrained:
    """The first, with the shortest of the members' longest inputs, since all are to read the same."""
    longest = min(member.config.max_source_length for member in members)
    return replace(members[0], config=members[0].config.model_copy(update={"max_source_length": longest}))


def revision_of(members: Sequence[Pretrained], average: Average) -> str:
    """Names what answers: the model's own revision, or one made of the members' in their order and the average."""
    if len(members) == 1:
        return members[0].revision
    parts = " ".join([average, *(member.revision for member in members)])
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


class Mean:
    """The mean of several predictions of what is right, taken up one by one, so that no more than two are held of a
    large vocabulary."""

    def __init__(self, average: Average) -> None:
        self._average, self._count = average, 0
        self._total: Tensor | None = None

    def add(self, logprobs: Tensor) -> None:
        """One member's log-probabilities (..., C), normalised."""
        self._count += 1
        if self._total is None:
            self._total = logprobs
        elif self._average == "logprob":
            self._total = self._total + logprobs
        else:  # not `logaddexp`, which gives the last elements of a tensor other bits
            self._total = torch.stack([self._total, logprobs]).logsumexp(0)

    @property
    def logprobs(self) -> Tensor:
        """Those of the mean, normalised (..., C); of one member, its own to the bit."""
        assert self._total is not None
        if self._count == 1:
            return self._total
        if self._average == "logprob":
            return (self._total / self._count).log_softmax(-1)
        return self._total - math.log(self._count)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Element by element, added up one after another: torch's own sum over an axis of five or more has other bits in a
    batch of another shape."""
    return reduce(torch.add, tensors) / len(tensors)


class Averaged:
    """Several models called as one of them is, `out = model(**batch)`: nll, the number of targets, and the state, which
    holds the members' side by side. The loss is the nll: an average is not trained."""

    def __init__(self, members: Sequence[Model], average: Average) -> None:
        self._members, self._average = members, average

    def __call__(self, *, state: State | None = None, **batch: Tensor) -> Output:
        if self._members[0].config.problem_type == "regression":
            return self._measured(**batch)
        mean, targets, states = Mean(self._average), torch.empty(0), []
        for member, own in zip(self._members, self._own(state), strict=True):
            logits, targets, after = member.target_logits(**batch, **({"state": own} if own else {}))  # type: ignore[arg-type]
            mean.add(logits.float().log_softmax(-1))
            if after is not None:
                states.append(after.values)
        out = labelled(mean.logprobs, targets)
        return replace(out, logits=None, state=State(torch.cat(states, dim=1)) if states else None)

    def _measured(self, **batch: Tensor) -> Output:
        pairs = [member.target_logits(**batch)[:2] for member in self._members]  # type: ignore[arg-type]
        numbers, (_, targets) = mean_of([numbers for numbers, _ in pairs]), pairs[0]
        return measured(numbers, targets, numbers.new_tensor(self._members[0].config.target_std))

    def _own(self, state: State | None) -> list[State | None]:
        """Each member's columns."""
        if state is None:
            return [None] * len(self._members)
        widths = [m.decoder.state_width for m in self._members if isinstance(m, SequenceGenerator)]
        return [State(values.contiguous()) for values in torch.split(state.values, widths, dim=1)]
