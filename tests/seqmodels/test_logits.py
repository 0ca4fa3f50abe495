"""Each rule against a few lines of plain Python, on random histories of different lengths in one batch."""

import math
import random

import torch

from seqmodels.decoding.constraints import WordEdges
from seqmodels.decoding.history import History
from seqmodels.decoding.logits import Rules
from seqmodels.decoding.params import SearchParams

EOS, VOCAB = 3, 12


def slow_rules(logits: list[float], history: list[int], generated: int, p: SearchParams, bad: list[list[int]]):  # type: ignore[no-untyped-def]
    out = list(logits)
    if p.repetition_penalty != 1:
        for token in set(history):
            out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    n = p.no_repeat_ngram_size
    if n:
        for i in range(len(history) - n + 1):
            if history[i : i + n - 1] == history[len(history) - n + 1 :]:
                out[history[i + n - 1]] = -math.inf
    for word in bad:
        if len(word) == 1 or history[-len(word) + 1 :] == word[:-1]:
            out[word[-1]] = -math.inf
    if generated + 1 < p.min_new_tokens:
        out[EOS] = -math.inf
    out = [x / p.temperature for x in out]
    if p.top_k:
        threshold = sorted(out, reverse=True)[min(p.top_k, VOCAB) - 1]
        out = [x if x >= threshold else -math.inf for x in out]
    if p.top_p < 1:
        top = max(out)
        total = sum(math.exp(x - top) for x in out)
        cumulative = 0.0
        kept = []
        for x, i in sorted(((-x, i) for i, x in enumerate(out))):
            if not kept or cumulative < p.top_p:
                kept.append(i)
            cumulative += math.exp(-x - top) / total
        out = [x if i in kept else -math.inf for i, x in enumerate(out)]
    constrained = all(x == -math.inf for x in out)
    if constrained:
        out[EOS] = 0.0
    return out, constrained


def test_rules_equal_plain_python() -> None:
    choose = random.Random(0)
    saw_constrained = 0
    for _ in range(300):
        params, bad_words, histories = [], [], []
        requests, width, prefix = choose.randint(1, 5), choose.randint(1, 3), choose.randint(0, 3)
        lengths = [choose.randint(0, 8) for _ in range(requests)]
        for _ in range(requests):
            sampling = choose.random() < 0.5
            params.append(
                SearchParams(
                    repetition_penalty=choose.choice([1.0, 1.5, 0.8]),
                    no_repeat_ngram_size=choose.choice([0, 0, 1, 2, 3]),
                    min_new_tokens=choose.choice([0, 0, 4]),
                    do_sample=sampling,
                    temperature=choose.choice([1.0, 0.5]) if sampling else 1.0,
                    top_k=choose.choice([0, 3, 50]) if sampling else 0,
                    top_p=choose.choice([1.0, 0.8]) if sampling else 1.0,
                )
            )
            few = [[choose.randrange(4) for _ in range(choose.choice([1, 2, 3]))] for _ in range(choose.choice([0, 3]))]
            bad_words.append(few if choose.random() < 0.9 else [[token] for token in range(VOCAB)])
        room = prefix + 9
        tokens = torch.tensor(
            [[[choose.randrange(4) for _ in range(room)] for _ in range(width)] for _ in range(requests)]
        )
        logits = torch.randn(requests, width, VOCAB)
        history = History(tokens, torch.tensor(lengths) + prefix, torch.tensor(lengths))
        got, constrained = Rules(
            params, bad_words, [()] * len(params), WordEdges.none(VOCAB, torch.device("cpu")), EOS, torch.device("cpu")
        ).apply(logits, history)
        for r in range(requests):
            for k in range(width):
                histories = tokens[r, k, : prefix + lengths[r]].tolist()
                want, ended = slow_rules(logits[r, k].tolist(), histories, lengths[r], params[r], bad_words[r])
                assert torch.allclose(got[r, k], torch.tensor(want), atol=1e-6), (params[r], bad_words[r])
                assert (constrained is not None and bool(constrained[r, k])) == ended
                saw_constrained += ended
    assert saw_constrained > 20


def test_without_rules_logits_are_untouched() -> None:
    logits = torch.randn(2, 3, VOCAB)
    history = History(torch.zeros(2, 3, 5, dtype=torch.int64), torch.tensor([2, 3]), torch.tensor([1, 1]))
    got, constrained = Rules(
        [SearchParams(), SearchParams()],
        [[], []],
        [(), ()],
        WordEdges.none(VOCAB, torch.device("cpu")),
        EOS,
        torch.device("cpu"),
    ).apply(logits, history)
    assert got is logits
    assert constrained is None
