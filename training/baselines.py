"""Baselines that cannot see what our models can: what they score says how much of a task needs more.

Both are a linear classifier on features of one item, trained by gradient descent on all data at once.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.rows import Row
from training.metrics import accuracy

STEPS, LEARNING_RATE = 200, 0.05


def bag_of_words(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Accuracy of a classifier that knows which words a text holds, and neither their order nor their neighbours."""
    words = {word: number for number, word in enumerate(sorted({w for row in train for w in str(row.input).split()}))}

    def features(rows: Sequence[Row]) -> Tensor:
        table = torch.zeros(len(rows), len(words))
        for number, row in enumerate(rows):
            for word in str(row.input).split():
                if word in words:
                    table[number, words[word]] = 1
        return table

    labels = [str(row.target) for row in train]
    predicted = _Labeller(features(train), labels, hidden_size=0).predict(features(test))
    return accuracy(predicted, [str(row.target) for row in test])


def single_frame(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Accuracy over frames of a classifier that sees one frame at a time. It has a hidden layer, to be fair."""

    def features(rows: Sequence[Row]) -> Tensor:
        frames = [np.asarray(Image.open(io.BytesIO(bytes(f)))) for row in rows for f in row.input]  # type: ignore[union-attr, arg-type]
        return torch.tensor(np.stack(frames)).flatten(1).float() / 255

    labels = [label for row in train for label in row.target]
    predicted = _Labeller(features(train), labels, hidden_size=64).predict(features(test))
    return accuracy(predicted, [label for row in test for label in row.target])


class _Labeller:
    """A small network from features (N, D) to one of the labels it was fitted to."""

    def __init__(self, features: Tensor, labels: Sequence[str], hidden_size: int) -> None:
        self._names = sorted(set(labels))
        targets = torch.tensor([self._names.index(label) for label in labels])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            width = features.shape[1]
            hidden = [nn.Linear(width, hidden_size), nn.ReLU()] if hidden_size else []
            self._net = nn.Sequential(*hidden, nn.Linear(hidden_size or width, len(self._names)))
        optimizer = torch.optim.AdamW(
            self._net.parameters(), LEARNING_RATE / (10 if hidden_size else 1), weight_decay=0.01
        )
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(self._net(features), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    @torch.no_grad()
    def predict(self, features: Tensor) -> list[str]:
        return [self._names[number] for number in self._net(features).argmax(1).tolist()]
