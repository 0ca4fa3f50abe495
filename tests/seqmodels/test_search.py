"""Search against oracles: brute force over all sequences, and a slow search in plain Python."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from seqmodels.decoding.best import best_candidates
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.decoding.search import Hypothesis
from seqmodels.models import SequenceGenerator
from seqmodels.state import State
from seqmodels.stepper import Group, Stepper
from tests.seqmodels.builders import RECURRENCES, make_language_model
from tests.seqmodels.oracles import Found, Table, brute_force, slow_beam_search, slow_greedy

PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)


def make_history_model(seed: int) -> SequenceGenerator:
    """A random model whose scores depend on the whole history through its State; every fifth has equal logits."""
    choose = random.Random(seed)
    recurrent = {**choose.choice(list(RECURRENCES.values())), "hidden_size": 8}
    sizes = {"vocab_size": choose.choice([4, 5]), "scale": choose.choice([1.0, 2.0, 4.0])}
    model = make_language_model(seed, recurrent=recurrent, **sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        weight, bias = model.decoder.output_weight, model.decoder.output_bias
        assert weight is not None
        if seed % 5 == 0:  # two tokens always equal, EOS one of them
            weight[3], bias[3] = weight[1], bias[1]
        if seed % 10 == 0:  # all equal, whatever the history
            weight.zero_()
            bias.zero_()
        bias[3] += choose.choice([-1.0, 0.0, 1.0]) if seed % 5 else 0.0
    return model


def search(model: SequenceGenerator, params: list[SearchParams]) -> list[list[Hypothesis]]:
    return generate(model, [Request(str(i), None, p) for i, p in enumerate(params)], max_rows=100_000)


def as_found(hypotheses: list[Hypothesis]) -> list[tuple[tuple[int, ...], float, str]]:
    return [(tuple(h.tokens), h.score, h.finish_reason) for h in hypotheses]


def expected(found: list[Found]) -> list[tuple[tuple[int, ...], float, str]]:
    return [(one.tokens, float(one.score), one.finish_reason) for one in found]


@pytest.mark.parametrize("block", range(10))
def test_exhaustive_width_equals_brute_force(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        model = make_history_model(seed)
        table = Table(model, 4)
        width = table.vocab_size**4
        params = [
            SearchParams(
                num_beams=width, num_return_sequences=25, max_new_tokens=4, length_penalty=p, early_stopping=early
            )
            for p in PENALTIES
            for early in (True, False)
        ]
        for p, hypotheses in zip(params, search(model, params), strict=True):
            everything = brute_force(table, p)
            score_of = {one.tokens: float(one.score) for one in everything}
            assert [h.score for h in hypotheses] == [float(one.score) for one in everything[:25]]
            assert [score_of[tuple(h.tokens)] for h in hypotheses] == [h.score for h in hypotheses]
            assert len({tuple(h.tokens) for h in hypotheses}) == 25
            if len({one.score for one in everything[:26]}) == 26:  # no ties, so the order is fixed too
                assert as_found(hypotheses) == expected(everything[:25])


@pytest.mark.parametrize("block", range(10))
def test_narrow_width_equals_slow_search(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        choose = random.Random(seed)
        model = make_history_model(seed)
        table = Table(model, 5)
        params = []
        for p in PENALTIES:
            for early in (True, False):
                width = choose.randint(2, 4)
                limit = choose.randint(4, 5)
                params.append(
                    SearchParams(
                        num_beams=width,
                        num_return_sequences=choose.randint(1, width),
                        max_new_tokens=limit,
                        min_new_tokens=choose.choice([0, 0, 2, 4]),
                        length_penalty=p,
                        early_stopping=early,
                    )
                )
        for p, hypotheses in zip(params, search(model, params), strict=True):
            assert as_found(hypotheses) == expected(slow_beam_search(table, p)), (seed, p)


def test_beam_of_one_is_greedy() -> None:
    for seed in range(60):
        model = make_history_model(seed)
        table = Table(model, 5)
        for limit, least in ((5, 0), (3, 0), (5, 3)):
            params = SearchParams(max_new_tokens=limit, min_new_tokens=least)
            assert as_found(search(model, [params])[0]) == expected([slow_greedy(table, params)])


def test_returned_scores_resum_from_returned_logprobs() -> None:
    for seed in range(40):
        model = make_history_model(seed)
        params = [
            SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=6, length_penalty=p) for p in PENALTIES
        ] + [SearchParams(do_sample=True, num_return_sequences=3, max_new_tokens=6, seed=seed)]
        for p, hypotheses in zip(params, search(model, params), strict=True):
            for h in hypotheses:
                total = torch.tensor(0.0)
                for logprob in h.logprobs:
                    total = total + torch.tensor(logprob)
                assert float(total / torch.tensor(float(len(h.logprobs)) ** p.length_penalty)) == h.score


def test_exact_stopping_returns_a_prefix_of_the_longer_list() -> None:
    for seed in range(100):
        model = make_history_model(seed)
        for penalty in PENALTIES:
            params = [
                SearchParams(
                    num_beams=4, num_return_sequences=n, max_new_tokens=6, length_penalty=penalty, early_stopping=False
                )
                for n in (1, 2, 3, 4)
            ]
            lists = [as_found(hypotheses) for hypotheses in search(model, params)]
            for shorter, longer in itertools.pairwise(lists):
                assert longer[: len(shorter)] == shorter


class Bigram(Stepper):
    """Scores of the next token by the last one alone."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(make_language_model(0, vocab_size=len(table)))
        self._table = table

    def step(self, tokens: torch.Tensor, state: State, groups: Sequence[Group]) -> Any:
        sizes = [group.num_requests * group.width for group in groups]
        parts = self._table[tokens[: sum(sizes)]].split(sizes)
        logits = [part.view(g.num_requests, g.width, -1) for part, g in zip(parts, groups, strict=True)]
        return logits, state, []


@pytest.mark.parametrize("early_stopping", [False, True])
def test_exact_stopping_knows_that_rules_may_end_a_text_before_its_least_length(early_stopping: bool) -> None:
    """After token 4 every other is banned, so EOS is allowed there, though 40 tokens were asked for at least; with a
    negative penalty the short text that is found late is better than the one that is found first."""
    table = torch.full((6, 6), -9.0)
    table[2, [5, 4]] = torch.tensor([3.0, 0.0])
    table[5, [1, 5, 0]] = torch.tensor([3.0, 1.2, 0.8])
    table[1, [0, 1]] = table[0, [4, 0]] = torch.tensor([3.0, 0.6])
    params = SearchParams(
        num_beams=3, max_new_tokens=40, min_new_tokens=40, length_penalty=-1.0, early_stopping=early_stopping
    )
    banned = tuple((4, token) for token in (0, 1, 2, 4, 5))
    (best, *_) = generate(Bigram(table), [Request("a", None, params, bad_words=banned)])[0]
    assert best.tokens == [5, 1, 0, 4, 3] and best.finish_reason == "constraint"


def test_a_penalty_that_no_score_survives_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"length_penalty is 10\.0 and max_new_tokens 8000: .* more than 1e30"):
        SearchParams(length_penalty=10.0, max_new_tokens=8000)
    SearchParams(length_penalty=-10.0, max_new_tokens=512)


def best_of(totals: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows that one hypothesis each has written, whose score is 0."""
    return best_candidates(torch.zeros(len(totals), 1), totals[:, None], count)


def test_ties_go_to_the_better_beam_then_to_the_smaller_token() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        totals = torch.randint(0, 6, (3, 40), generator=generator).float()
        totals[0, :30] = float("-inf")
        values, index = best_of(totals, 8)
        for row in range(3):
            order = sorted(range(40), key=lambda i: (-totals[row, i], i))[:8]
            assert index[row].tolist() == order
            assert values[row].tolist() == totals[row, order].tolist()


def test_a_prefix_is_returned_but_not_scored() -> None:
    model = make_language_model(3, vocab_size=6)
    params = SearchParams(num_beams=3, num_return_sequences=3, max_new_tokens=4)
    free = search(model, [SearchParams(num_beams=1, max_new_tokens=4)])[0][0]
    hypotheses = generate(model, [Request("a", None, params, prefix=(4, 5))])[0]
    for h in hypotheses:
        assert h.tokens[:2] == [4, 5]
        assert len(h.logprobs) == len(h.tokens) - 2
        labels = torch.tensor([[2, *h.tokens]])
        with torch.inference_mode():
            scores = model.logprobs(labels, torch.tensor([labels.shape[1]]))[0]
        assert torch.allclose(scores[2:], torch.tensor(h.logprobs), atol=1e-5)
    forced = generate(model, [Request("a", None, SearchParams(max_new_tokens=2), prefix=tuple(free.tokens[:2]))])[0][0]
    assert forced.tokens == free.tokens[:4]


def test_logprobs_are_the_models_own_without_rules() -> None:
    model = make_language_model(5, vocab_size=7)
    for h in search(model, [SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=5)])[0]:
        labels = torch.tensor([[2, *h.tokens]])
        with torch.inference_mode():
            scores = model.logprobs(labels, torch.tensor([labels.shape[1]]))[0]
        assert torch.allclose(scores, torch.tensor(h.logprobs), atol=1e-5)


def test_best_candidates_of_several_hypotheses() -> None:
    """Sums of scores and logprobs, rounded so that many are equal, and hypotheses that do not exist."""
    generator = torch.Generator().manual_seed(1)
    for vocab_size in (7, 64, 200, 1000):
        scores = torch.randint(-4, 1, (8, 5), generator=generator) / 4
        scores[:4, 3:] = float("-inf")
        logprobs = -torch.rand(8, 5, vocab_size, generator=generator).mul(vocab_size).round() / 4
        logprobs[:, :, ::5] = float("-inf")
        logprobs[7] = torch.randn(5, vocab_size, generator=generator)  # no equals beside those that have some
        values, index = best_candidates(scores, logprobs, 10)
        for r in range(8):
            sums = (scores[r, :, None] + logprobs[r]).flatten().tolist()
            expected = sorted(range(len(sums)), key=lambda i: (-sums[i], i))[:10]
            real = [i for i in expected if sums[i] > float("-inf")]
            assert values[r].tolist() == [sums[i] for i in expected]
            assert index[r, : len(real)].tolist() == real


def test_best_candidates_of_long_rows_wherever_they_stand() -> None:
    """Rows long enough to be searched by blocks: the best spread over many blocks, in one, at the end, and tied."""
    generator = torch.Generator().manual_seed(0)
    for width in (1408, 4096, 4097, 7777):
        for spread in (1, 64, 65, width // 12):
            totals = torch.rand(6, width, generator=generator)
            for k in range(12):  # the best stand `spread` apart, from the end; in half of the rows they are equal
                totals[:3, width - 1 - k * spread % width] += 12 - k
                totals[3:, width - 1 - k * spread % width] = 20.0
            values, index = best_of(totals, 10)
            for row in range(6):
                expected = sorted(range(width), key=lambda i: (-float(totals[row, i]), i))[:10]
                assert index[row].tolist() == expected
                assert torch.equal(values[row], totals[row, expected])
