"""Searches written to be believed, not to be fast: plain Python, from the words of DESIGN section 4."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from seqmodels.decoding.params import SearchParams
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Group, Stepper

F32 = np.float32


@dataclass(frozen=True)
class Found:
    tokens: tuple[int, ...]
    score: np.float32
    finish_reason: str


class Table:
    """A model's logits after every history of up to `depth` tokens, by asking its `Stepper`; of one that attends, also
    where it looks."""

    def __init__(self, model: SequenceGenerator, depth: int, source: torch.Tensor | None = None) -> None:
        assert model.config.decoder is not None
        self.eos = model.config.decoder.eos_token_id
        self.vocab_size = model.config.decoder.vocab_size
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}
        self.attention: dict[tuple[int, ...], list[float]] = {}  # by history, over the source's positions
        self._cache: dict[tuple[tuple[int, ...], frozenset[int]], list[np.float32]] = {}
        histories: list[tuple[int, ...]] = [()]
        tokens = torch.tensor([model.config.decoder.bos_token_id] * 4)
        stepper = Stepper(model)
        with torch.inference_mode():
            memory = None
            if source is not None:
                memory = stepper.encode(source.expand(4, -1), torch.full((4,), len(source)))
            state = stepper.start(memory, 4)
            for _ in range(depth):
                one = memory and memory.select(torch.tensor([0]))  # all histories look at the same source
                (logits,), state, weights = stepper.step(tokens, state, [Group(1, len(tokens), one)])
                self._logits.update(zip(histories, logits[0], strict=False))
                self.attention.update(
                    zip(histories, [row.tolist() for lane in weights for row in lane[0]], strict=False)
                )
                rows = torch.arange(len(histories)).repeat_interleave(self.vocab_size)
                histories = [(*h, v) for h in histories for v in range(self.vocab_size)]
                tokens = torch.tensor([h[-1] for h in histories])
                state = state.select(rows)

    def logprobs(self, history: tuple[int, ...], banned: Iterable[int] = ()) -> list[np.float32]:
        key = (history, frozenset(banned))
        if key not in self._cache:
            logits = self._logits[history].clone()
            logits[list(key[1])] = float("-inf")
            self._cache[key] = [F32(x) for x in logits.expand(4, -1).log_softmax(-1)[0].tolist()]
        return self._cache[key]


def score(total: np.float32, length: int, penalty: float) -> np.float32:
    return F32(total / F32(float(length) ** penalty))


def final_score(table: Table, tokens: tuple[int, ...], total: np.float32, params: SearchParams) -> np.float32:
    """Of a finished hypothesis. Wu et al. 2016, equation 14, with our length penalty."""
    normalised = score(total, len(tokens), params.length_penalty)
    if not params.coverage_penalty:
        return normalised
    steps = [table.attention[tokens[:t]] for t in range(len(tokens))]
    covered = [min(math.fsum(position), 1.0) for position in zip(*steps, strict=True)]
    return F32(normalised + F32(params.coverage_penalty * math.fsum(math.log(share) for share in covered)))


def brute_force(
    table: Table, params: SearchParams, banned: Callable[[tuple[int, ...]], Iterable[int]] = lambda tokens: ()
) -> list[Found]:
    """Every sequence that ends with EOS within the limit, or reaches the limit without; best first.

    banned: the tokens that may not follow what is written.
    """
    others = [v for v in range(table.vocab_size) if v != table.eos]
    found = []
    for length in range(1, params.max_new_tokens + 1):
        last = [table.eos] if length < params.max_new_tokens else range(table.vocab_size)
        for head in itertools.product(others, repeat=length - 1):
            for token in last:
                tokens = (*head, token)
                total = F32(0)
                for i, v in enumerate(tokens):
                    total = F32(total + table.logprobs(tokens[:i], banned(tokens[:i]))[v])
                reason = "eos" if token == table.eos else "length"
                found.append(Found(tokens, final_score(table, tokens, total, params), reason))
    return sorted(found, key=lambda one: -one.score)


def slow_beam_search(table: Table, params: SearchParams) -> list[Found]:
    """Rule 3, sentence by sentence."""
    width, limit, wanted = params.num_beams, params.max_new_tokens, params.num_return_sequences
    live: list[tuple[np.float32, tuple[int, ...]]] = [(F32(0), ())]
    pool: list[Found] = []
    for length in range(1, limit + 1):
        banned = [table.eos] if length < params.min_new_tokens else []
        candidates = [
            (F32(total + logprob), beam, token)
            for beam, (total, tokens) in enumerate(live)
            for token, logprob in enumerate(table.logprobs(tokens, banned))
            if logprob > -np.inf
        ]
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        next_live = []
        for rank, (total, beam, token) in enumerate(candidates[: 2 * width]):
            tokens = (*live[beam][1], token)
            if token != table.eos:
                next_live.append((total, tokens))
            elif rank < width:
                pool.append(Found(tokens, final_score(table, tokens, total, params), "eos"))
        live = next_live[:width]
        pool = sorted(pool, key=lambda one: -one.score)[:width]  # stable: earlier ones win ties
        if params.early_stopping:
            if len(pool) == width:
                break
        elif len(pool) >= wanted and not (live and bound(live[0][0], length, params) > pool[wanted - 1].score):
            break
        if not live:
            break
        if length == limit:
            pool += [Found(tokens, final_score(table, tokens, total, params), "length") for total, tokens in live]
            pool = sorted(pool, key=lambda one: -one.score)[:width]
    return pool[:wanted]


def bound(total: np.float32, length: int, params: SearchParams) -> np.float32:
    p, limit = params.length_penalty, params.max_new_tokens
    if p > 0:
        return F32(total / F32(float(limit) ** p))
    if p == 0:
        return total
    return F32(total / F32(float(max(min(length + 1, limit), params.min_new_tokens)) ** p))


def slow_greedy(table: Table, params: SearchParams) -> Found:
    tokens: tuple[int, ...] = ()
    total = F32(0)
    while True:
        logprobs = table.logprobs(tokens, [table.eos] if len(tokens) + 1 < params.min_new_tokens else [])
        best = max(range(len(logprobs)), key=lambda v: (logprobs[v], -v))
        total = F32(total + logprobs[best])
        tokens = (*tokens, best)
        if best == table.eos:
            return Found(tokens, score(total, len(tokens), params.length_penalty), "eos")
        if len(tokens) == params.max_new_tokens:
            return Found(tokens, score(total, len(tokens), params.length_penalty), "length")
