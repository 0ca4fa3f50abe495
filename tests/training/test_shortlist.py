"""IBM model 1 on tensors, against the same in plain Python, and on a language whose dictionary is known."""

import random
from collections import defaultdict

import pytest
import torch

from seqmodels.errors import DataError
from seqmodels.shortlist import NONE
from seqmodels.tokenizer import EOS, UNK
from training import shortlist
from training.shortlist import ROUNDS, learn_shortlist


def slow_model_1(pairs: list[tuple[list[int], list[int]]]) -> dict[tuple[int, int], float]:
    """t(target | source), from the paper's words."""
    t: dict[tuple[int, int], float] = defaultdict(lambda: 1.0)
    for _ in range(ROUNDS):
        counts: dict[tuple[int, int], float] = defaultdict(float)
        totals: dict[int, float] = defaultdict(float)
        for source, target in pairs:
            for f in target:
                whole = sum(t[e, f] for e in source)
                for e in source:
                    counts[e, f] += t[e, f] / whole
                    totals[e] += t[e, f] / whole
        t = defaultdict(float, {(e, f): count / totals[e] for (e, f), count in counts.items()})
    return t


def test_the_likeliest_translations_are_those_of_the_slow_model() -> None:
    choose = random.Random(0)
    pairs = [
        (
            [choose.randint(4, 11) for _ in range(choose.randint(1, 6))] + [EOS],
            [choose.randint(4, 15) for _ in range(5)],
        )
        for _ in range(40)
    ]
    expected = slow_model_1(pairs)
    found = learn_shortlist([(torch.tensor(s), torch.tensor(t)) for s, t in pairs], (12, 16), 3, 0)
    for e in range(12):
        best = sorted((p for (source, _), p in expected.items() if source == e), reverse=True)[:3]
        chosen = [f for f in found.translations[e].tolist() if f != NONE]
        assert [round(expected[e, f], 4) for f in chosen] == [round(p, 4) for p in best]


def test_a_dictionary_is_found_among_words_in_any_order() -> None:
    choose = random.Random(1)
    pairs = []
    for _ in range(300):
        words = choose.sample(range(4, 44), 6)
        pairs.append((torch.tensor([*words, EOS]), torch.tensor(choose.sample([w + 100 for w in words], 6))))
    found = learn_shortlist(pairs, (44, 144), 2, 5)
    assert found.translations[4:, 0].tolist() == list(range(104, 144))
    assert (found.translations[:2] == NONE).all()  # never seen
    assert len(found.always) == 6 and EOS in found.always
    words = found.of(torch.tensor([7, 9, EOS]), further=[3, 140]).tolist()
    assert {107, 109, EOS, 3, 140} <= set(words) and words == sorted(set(words))


def test_what_is_always_listed_can_be_written() -> None:
    """However frequent <unk> is among the targets."""
    found = learn_shortlist([(torch.tensor([4, EOS]), torch.tensor([UNK, UNK, 7]))] * 3, (5, 9), 2, 1)
    assert found.always.tolist() == [EOS, 7]


def test_no_more_links_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too long by itself is left out; the others are taken while there is room."""
    monkeypatch.setattr(shortlist, "MAX_LINKS", 100)
    pairs = [(torch.full((n,), 4), torch.full((n,), 5)) for n in (20, 5, 5, 5, 5, 5, 5, 20)]
    drawn = shortlist._drawn(pairs)
    assert [len(source) for source, _ in drawn] == [5] * 4
    assert learn_shortlist(pairs, (5, 6), 1, 1).translations[4].tolist() == [5]


def test_nothing_to_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no pair of sentences to learn a shortlist from"):
        learn_shortlist([], (5, 6), 1, 1)
    monkeypatch.setattr(shortlist, "MAX_LINKS", 3)
    with pytest.raises(DataError, match="no pair of sentences"):
        learn_shortlist([(torch.tensor([4, EOS]), torch.tensor([5, 5]))], (5, 6), 1, 1)
