"""Self-critical training (Rennie et al. 2017): a generator learns from the texts that it writes, by the task's metric.

Of each input it writes one text by drawing its tokens and one greedily, as it would be served. What makes the first
better than the second becomes likelier, what makes it worse less likely: the policy gradient (Williams 1992) of the
expected reward, with the greedy text's as its baseline. Knows a model, a tokenizer and a reward; knows no loop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.losses import Output
from seqmodels.models import SequenceGenerator
from seqmodels.tokenizer import BOS, EOS, PAD, Tokenizer
from training import captions, metrics
from training.data.rows import Row

Reward = Callable[[str, Sequence[str]], float]  # of a text, given the right ones: 1 is good, 0 is bad
Choose = Callable[[Tensor], Tensor]  # log-probabilities (B, V) -> a token for each row (B,)
REWARDS: dict[str, Reward] = {
    "chrf": metrics.sentence_chrf,
    "bleu": metrics.sentence_bleu,
    "exact_match": lambda text, references: metrics.exact_match([text], [references]),
}


@dataclass(frozen=True)
class Written:
    """labels (B, T+1): BOS and the tokens. counts (B,): how many of these. logprobs (B,): of all of a row's tokens."""

    labels: Tensor
    counts: Tensor
    logprobs: Tensor


class CiderReward:
    """CIDEr-D of one caption, by the weights of the training split's n-grams; 1 is what is reported as 100. Each text
    ends with a token of its own: else captions that break off after "with a" are worth as much as whole ones."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._cider = captions.Cider([[_ended(text) for text in row.references] for row in rows])

    def __call__(self, text: str, references: Sequence[str]) -> float:
        return self._cider.score(_ended(text), [_ended(one) for one in references])


def _ended(text: str) -> list[str]:
    return [*captions.tokens(text), "<eos>"]


class SelfCritical:
    """A generator with an encoder called as one is, `out = model(**batch)`; its loss is the model's own, mixed by
    `weight` with minus the rewards' part. nll stays that of the true targets."""

    def __init__(
        self, model: SequenceGenerator, tokenizer: Tokenizer, reward: Reward, weight: float, max_new_tokens: int
    ) -> None:
        self._model, self._tokenizer, self._reward = model, tokenizer, reward
        self._weight, self._max_new_tokens = weight, max_new_tokens

    def __call__(
        self,
        labels: Tensor,
        label_lengths: Tensor,
        inputs: Tensor,
        lengths: Tensor | None = None,
        references: Sequence[Sequence[str]] = (),
    ) -> Output:
        """references: all the right texts of each row, where it may have others than its labels."""
        given: dict[str, Any] = {"inputs": inputs, "lengths": lengths}
        out: Output = self._model(labels, label_lengths, **given)
        drawn = self._write(_draw, **given)
        with torch.no_grad(), _in_evaluation(self._model):
            greedy = self._write(_likeliest, **given)
        own = [[text] for text in self._texts(labels, label_lengths)]
        references = [several or one for several, one in zip(references or own, own, strict=True)]
        rewards = [self._rewards(self._texts(each.labels, each.counts), references) for each in (drawn, greedy)]
        advantage = torch.tensor(rewards[0], device=labels.device) - torch.tensor(rewards[1], device=labels.device)
        # Over the number of true targets, as the model's own loss is, so that batches of any size add up alike.
        cost = -(advantage * drawn.logprobs).sum() / out.num_targets
        return replace(out, loss=(1 - self._weight) * out.loss + self._weight * cost)

    def _write(self, choose: Choose, inputs: Tensor, lengths: Tensor | None) -> Written:
        """A text for each row, token by token. Dropout, if it acts, acts on what is drawn as on what is learned from
        it: else texts would look less likely than they were, and as most are worse than the greedy one, all would
        become so."""
        memory = self._model.encode(inputs, lengths)
        state = self._model.start(memory, len(memory.values))
        token = memory.mask.new_full((len(memory.values),), BOS, dtype=torch.int64)
        tokens, logprobs, counts, live = [token], [], torch.ones_like(token), token == BOS
        for _ in range(self._max_new_tokens):
            logits, state = self._model.decoder(token[:, None], state, memory)
            each = logits[:, 0].float().log_softmax(-1)
            token = choose(each.detach()).masked_fill(~live, PAD)
            tokens.append(token)
            logprobs.append(each.gather(1, token[:, None])[:, 0] * live)
            counts, live = counts + live, live & (token != EOS)
            if not live.any():
                break
        return Written(torch.stack(tokens, 1), counts, torch.stack(logprobs, 1).sum(1))

    def _texts(self, labels: Tensor, label_lengths: Tensor) -> list[str]:
        pairs = zip(labels.tolist(), label_lengths.tolist(), strict=True)
        return [self._tokenizer.decode(tokens[:length]) for tokens, length in pairs]

    def _rewards(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [self._reward(text, right) for text, right in zip(texts, references, strict=True)]


def _draw(logprobs: Tensor) -> Tensor:
    return logprobs.exp().multinomial(1)[:, 0]


def _likeliest(logprobs: Tensor) -> Tensor:
    return logprobs.argmax(-1)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]  # what is frozen is in evaluation already
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
