"""A linear chain over labels (Lafferty et al. 2001): what a label says of the one after it.

A sequence of labels y scores `start[y_1] + sum of scores[t, y_t] + sum of transitions[y_(t-1), y_t] + end[y_T]`, and
its probability is the softmax of that over all sequences. Positions without a label, such as the first pieces of a word
and padding, are no part of the chain: it goes from one labelled position to the next. Knows no encoder.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearChain(nn.Module):
    """It begins at 0, where labels say nothing of each other. C labels."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(num_labels))
        self.transitions = nn.Parameter(torch.zeros(num_labels, num_labels))  # from, to
        self.end = nn.Parameter(torch.zeros(num_labels))

    def forward(self, scores: Tensor, labels: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        """The negative log-probability in nats of each row's whole sequence of labels: (B,), 0 where there is none; and
        what `logprobs` gives, without a gradient.

        scores (B, S, C) in float32; labels (B, S), read only where labelled (B, S) says so.
        """
        before = self._messages(scores, labelled, self.start, self.transitions)
        totals = (_at(before + scores, _last(labelled)) + self.end).logsumexp(-1)
        costs = (totals - self._score(scores, labels, labelled)).where(labelled.any(1), 0.0)
        with torch.no_grad():
            return costs, self._logprobs(before, scores, labelled)

    def logprobs(self, scores: Tensor, labelled: Tensor) -> Tensor:
        """The log-probability in nats of each label at each labelled position, given the whole row: (B, S, C).

        Summed over all sequences that have it there, so it is the likeliest label, not the likeliest sequence, that
        argmax finds: the choice with the fewest wrong labels to be expected.
        """
        before = self._messages(scores, labelled, self.start, self.transitions)
        return self._logprobs(before, scores, labelled)

    def _logprobs(self, before: Tensor, scores: Tensor, labelled: Tensor) -> Tensor:
        after = self._messages(scores.flip(1), labelled.flip(1), self.end, self.transitions.mT).flip(1)
        return (before + scores + after).log_softmax(-1)

    def _messages(self, scores: Tensor, labelled: Tensor, first: Tensor, transitions: Tensor) -> Tensor:
        """What all positions before each one say of its label (B, S, C): the log of a sum over their labels."""
        message = first.expand(len(scores), -1)
        messages = []
        for t in range(scores.shape[1]):
            messages.append(message)
            through = (message + scores[:, t])[:, :, None] + transitions  # (B, from, to)
            message = torch.where(labelled[:, t, None], through.logsumexp(1), message)
        return torch.stack(messages, dim=1)

    def _score(self, scores: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        """Of each row's own labels: (B,)."""
        labels = labels.where(labelled, 0)
        steps = torch.arange(labels.shape[1], device=labels.device)
        until = steps.where(labelled, -1).cummax(1).values  # the last labelled position up to here
        before = torch.cat([torch.full_like(until[:, :1], -1), until[:, :-1]], dim=1)
        pairs = labels.gather(1, before.clamp(min=0)) * len(self.start) + labels
        # An embedding adds its gradients up in one order; indexing a matrix does not, on several threads.
        steps_between = F.embedding(pairs, self.transitions.reshape(-1, 1))[:, :, 0]
        steps_between = steps_between.where(labelled & (before >= 0), 0.0)
        own = scores.gather(2, labels[:, :, None])[:, :, 0].where(labelled, 0.0)
        ends = self.start[_at(labels, labelled.int().argmax(1))] + self.end[_at(labels, _last(labelled))]
        return own.sum(1) + steps_between.sum(1) + ends


def _last(labelled: Tensor) -> Tensor:
    """Each row's last labelled position (B,)."""
    return labelled.shape[1] - 1 - labelled.flip(1).int().argmax(1)


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """values (B, S, ...) at one position of each row (B,)."""
    return values[torch.arange(len(values), device=values.device), positions]
