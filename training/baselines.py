"""Baselines that cannot see what our models can: what they score says how much of a task needs more.

Both are small networks on features of one item, trained by gradient descent on all data at once, but for the tenth that
tells when they were best.
"""

import copy
import io
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.rows import Row
from training.metrics import accuracy

STEPS, LEARNING_RATE = 200, 0.05
LARGEST_SIDE = 32  # of a frame, in pixels


def bag_of_words(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Accuracy of a classifier that knows which words a text holds, and neither their order nor their neighbours."""
    train = _shuffled(train)
    words = {word: number for number, word in enumerate(sorted({w for row in train for w in str(row.input).split()}))}

    def features(rows: Sequence[Row]) -> Tensor:
        """Sparse: as many words as there are, a text holds few of them."""
        found = [sorted({words[word] for word in str(row.input).split() if word in words}) for row in rows]
        places = [(number, word) for number, held in enumerate(found) for word in held]
        return torch.sparse_coo_tensor(
            torch.tensor(places).view(-1, 2).T,
            torch.ones(len(places)),
            (len(rows), len(words)),
            is_coalesced=True,
            check_invariants=True,
        )

    labels = [str(row.target) for row in train]
    predicted = _Labeller(features(train), labels, hidden_size=0).predict(features(test))
    return accuracy(predicted, [str(row.target) for row in test])


def single_frame(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Accuracy of a classifier that sees one frame at a time: over frames, or over clips, where a label is that of a
    whole clip and each of its frames has a vote. It has a hidden layer, to be fair."""

    train = _shuffled(train)
    with Image.open(io.BytesIO(_frames(train[0])[0])) as first:
        size = min(first.width, LARGEST_SIDE), min(first.height, LARGEST_SIDE)

    def features(rows: Sequence[Row]) -> Tensor:
        files = (io.BytesIO(frame) for row in rows for frame in _frames(row))
        frames = [np.asarray(Image.open(file).convert("RGB").resize(size)) for file in files]
        return torch.tensor(np.stack(frames)).flatten(1).float() / 255

    labels = [label for row in train for label in _frame_labels(row)]
    votes = _Labeller(features(train), labels, hidden_size=64).log_probabilities(features(test))
    if isinstance(test[0].target, str):
        votes = torch.stack([clip.sum(0) for clip in torch.split(votes, [len(_frames(row)) for row in test])])
    predicted = [sorted(set(labels))[number] for number in votes.argmax(1).tolist()]
    return accuracy(predicted, [label for row in test for label in row.references])


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    """Whoever holds out the last tenth of them holds out some of each kind."""
    return random.Random(1).sample(rows, len(rows))


def _frames(row: Row) -> list[bytes]:
    assert isinstance(row.input, tuple)
    return [frame for frame in row.input if isinstance(frame, bytes)]


def _frame_labels(row: Row) -> Sequence[str]:
    return (row.target,) * len(_frames(row)) if isinstance(row.target, str) else row.target


class _Labeller:
    """A small network from features (N, D) to one of the labels it was fitted to: as it was when it was best at the
    last tenth, which it does not learn from."""

    def __init__(self, features: Tensor, labels: Sequence[str], hidden_size: int) -> None:
        self._names = sorted(set(labels))
        targets = torch.tensor([self._names.index(label) for label in labels])
        learned = max(1, len(labels) * 9 // 10)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            width = features.shape[1]
            hidden = [nn.Linear(width, hidden_size), nn.ReLU()] if hidden_size else []
            self._net = nn.Sequential(*hidden, nn.Linear(hidden_size or width, len(self._names)))
        known, held_out = features.narrow_copy(0, 0, learned), features.narrow_copy(0, learned, len(labels) - learned)
        optimizer = torch.optim.AdamW(
            self._net.parameters(), LEARNING_RATE / (10 if hidden_size else 1), weight_decay=0.01
        )
        least, best = math.inf, self._net.state_dict()
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(self._net(known), targets[:learned]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                loss = F.cross_entropy(self._net(held_out), targets[learned:]).item()
            if loss < least:
                least, best = loss, copy.deepcopy(self._net.state_dict())
        self._net.load_state_dict(best)

    @torch.no_grad()
    def log_probabilities(self, features: Tensor) -> Tensor:
        """Of the labels in their order by the alphabet, (N, labels)."""
        return F.log_softmax(self._net(features), dim=1)

    def predict(self, features: Tensor) -> list[str]:
        return [self._names[number] for number in self.log_probabilities(features).argmax(1).tolist()]
