"""Rules on logits: penalties, bans and truncation, for all requests of a lane at once.

Knows logits and the tokens so far; knows no search and no text. A rule touches only the requests that ask for it, and
each row on its own, so that no request's answer depends on its neighbours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqmodels.decoding.constraints import Constraints, Phrases, Standing, WordEdges
from seqmodels.decoding.history import NEVER, History
from seqmodels.decoding.params import SearchParams


class Rules:
    """The rules of a lane's R requests, built anew whenever one joins or leaves."""

    def __init__(
        self,
        params: Sequence[SearchParams],
        bad_words: Sequence[Phrases],
        force_words: Sequence[Phrases],
        edges: WordEdges,
        eos: int,
        device: torch.device,
    ) -> None:
        self._eos = eos
        self._device = device
        self._repetition = self._asked([p.repetition_penalty for p in params], neutral=1.0)
        self._ngrams = {
            size: torch.tensor([r for r, p in enumerate(params) if p.no_repeat_ngram_size == size], device=device)
            for size in {p.no_repeat_ngram_size for p in params} - {0}
        }
        self._bad_words = _BadWords(bad_words, device) if any(bad_words) else None
        self._min_new_tokens = self._asked([p.min_new_tokens for p in params], neutral=0)
        self._temperature = self._asked([p.temperature for p in params], neutral=1.0)
        self._top_k = self._asked([p.top_k for p in params], neutral=0)
        self._top_p = self._asked([p.top_p for p in params], neutral=1.0)
        self._constraints = Constraints(force_words, edges) if any(force_words) else None
        # What bans EOS alone leaves other tokens.
        self._may_ban_all = bool(self._ngrams or self._bad_words or self._constraints)
        asked = (self._repetition, self._min_new_tokens, self._temperature, self._top_k, self._top_p)
        self.change_logits = self._may_ban_all or any(option is not None for option in asked)

    def _asked(self, values: Sequence[float], neutral: float) -> tuple[Tensor, Tensor] | None:
        """The requests that set an option, and their values; None where nobody does."""
        chosen = [r for r, value in enumerate(values) if value != neutral]
        if not chosen:
            return None
        return torch.tensor(chosen, device=self._device), torch.tensor([values[r] for r in chosen], device=self._device)

    def standing(self, history: History) -> Standing | None:
        """How the hypotheses stand to the forced words, where a request has some."""
        return self._constraints.standing(history) if self._constraints else None

    def apply(self, logits: Tensor, history: History, standing: Standing | None = None) -> tuple[Tensor, Tensor | None]:
        """logits (R, K, V) of float32 -> (logits after the rules, constrained (R, K) or None).

        Where the rules leave a hypothesis no token, EOS is allowed and the hypothesis is marked as constrained.
        """
        if standing:
            logits = standing.ban(logits, self._eos)
        if self._repetition:
            logits = self._penalise_repetition(logits, history, *self._repetition)
        for size, requests in self._ngrams.items():
            logits = self._ban_repeating(logits, history, requests, size)
        if self._bad_words:
            logits = logits.masked_fill(self._bad_words.banned(history, logits.shape[-1]), float("-inf"))
        if self._min_new_tokens:
            requests, least = self._min_new_tokens
            early = history.generated[requests] + 1 < least  # EOS itself counts as a token
            logits = logits.clone()
            logits[requests, :, self._eos] = logits[requests, :, self._eos].masked_fill(early[:, None], float("-inf"))
        if self._temperature:
            requests, temperature = self._temperature
            logits = _replaced(logits, requests, lambda old: old / temperature[:, None, None])
        if self._top_k:
            requests, top_k = self._top_k
            logits = _replaced(logits, requests, lambda old: _keep_top_k(old, top_k))
        if self._top_p:
            requests, top_p = self._top_p
            logits = _replaced(logits, requests, lambda old: _keep_top_p(old, top_p))
        return self._let_end(logits) if self._may_ban_all else (logits, None)

    def _penalise_repetition(self, logits: Tensor, history: History, requests: Tensor, penalty: Tensor) -> Tensor:
        """Keskar et al. 2019: the logit of a token seen before is divided by the penalty, or multiplied if negative."""
        seen = _seen(history.select(requests), logits.shape[-1])
        factor = penalty[:, None, None]
        return _replaced(
            logits, requests, lambda old: torch.where(seen, torch.where(old > 0, old / factor, old * factor), old)
        )

    def _ban_repeating(self, logits: Tensor, history: History, requests: Tensor, size: int) -> Tensor:
        banned = _repeating(history.select(requests), size, logits.shape[-1])
        return _replaced(logits, requests, lambda old: old.masked_fill(banned, float("-inf")))

    def _let_end(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        constrained = logits.isneginf().all(-1)
        logits = logits.clone()
        logits[..., self._eos] = logits[..., self._eos].masked_fill(constrained, 0.0)
        return logits, constrained


class _BadWords:
    """Token sequences never written: the last token is banned where a hypothesis ends with the others.

    heads: (R, W, L-1), all but the last token, right-aligned behind wildcards; last: (R, W).
    """

    def __init__(self, bad_words: Sequence[Sequence[Sequence[int]]], device: torch.device) -> None:
        words = max(len(request) for request in bad_words)
        length = max((len(word) for request in bad_words for word in request), default=1)
        heads = torch.full((len(bad_words), words, length - 1), NEVER)
        last = torch.full((len(bad_words), words), NEVER)
        for r, request in enumerate(bad_words):
            for w, word in enumerate(request):
                last[r, w] = word[-1]
                if len(word) > 1:
                    heads[r, w, length - len(word) :] = torch.tensor(word[:-1])
        self._heads, self._last = heads.to(device), last.to(device)

    def banned(self, history: History, vocab_size: int) -> Tensor:
        """(R, K, V)"""
        tail = history.tail(self._heads.shape[2])[:, :, None]  # (R, K, 1, L-1)
        heads = self._heads[:, None]  # (R, 1, W, L-1)
        match = ((heads == tail) | (heads == NEVER)).all(-1)  # (R, K, W)
        last = self._last[:, None].expand_as(match)
        return _marked(last.masked_fill(~match, NEVER), vocab_size)


def _replaced(logits: Tensor, requests: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """logits with `change` applied to the rows of some requests."""
    return logits.index_copy(0, requests, change(logits[requests]))


def _marked(tokens: Tensor, vocab_size: int) -> Tensor:
    """tokens (R, K, X), NEVER for none -> mask (R, K, V), true at each of them."""
    mask = tokens.new_zeros((*tokens.shape[:2], vocab_size + 1), dtype=torch.bool)
    return mask.scatter_(2, tokens.masked_fill(tokens < 0, vocab_size), True)[..., :vocab_size]


def _seen(history: History, vocab_size: int) -> Tensor:
    """Mask (R, K, V) of the tokens in each history."""
    positions = torch.arange(history.tokens.shape[2], device=history.tokens.device)
    unwritten = positions >= history.written[:, None, None]
    return _marked(history.tokens.masked_fill(unwritten, NEVER), vocab_size)


def _repeating(history: History, size: int, vocab_size: int) -> Tensor:
    """Mask (R, K, V) of the tokens that would write an n-gram a second time."""
    if history.tokens.shape[2] < size:
        return _marked(history.tokens[..., :0], vocab_size)
    windows = history.tokens.unfold(2, size, 1)  # (R, K, M-size+1, size)
    last = torch.arange(windows.shape[2], device=windows.device) + size - 1
    match = (windows[..., :-1] == history.tail(size - 1)[:, :, None]).all(-1) & (last < history.written[:, None, None])
    return _marked(windows[..., -1].masked_fill(~match, NEVER), vocab_size)


def _keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """The k best of each row, and those equal to the k-th. logits (R, K, V), top_k (R,)."""
    top_k = top_k.clamp(max=logits.shape[-1])
    best = logits.topk(int(top_k.max()), dim=-1).values
    threshold = best.gather(2, (top_k - 1)[:, None, None].expand(-1, logits.shape[1], 1))
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of best tokens whose probability reaches p (Holtzman et al. 2020). top_p (R,)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    keep = before < top_p[:, None, None]
    keep[..., 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter_(2, index, keep), float("-inf"))
