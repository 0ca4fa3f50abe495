"""Forced words: whole, in every output that has room for them, and in the best such outputs where all are tried."""

import random

import pytest
import torch

from seqmodels.decoding.constraints import Constraints, Phrases, WordEdges, missing
from seqmodels.decoding.generate import generate
from seqmodels.decoding.history import History
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from tests.seqmodels.builders import make_language_model
from tests.seqmodels.oracles import Table, brute_force

EOS = 3


def make_edges(vocab_size: int, going_on: int) -> WordEdges:
    """The special tokens are of no word, the others are letters; the last `going_on` of them never begin a word."""
    letters, inner = torch.arange(vocab_size) > EOS, torch.arange(vocab_size) >= vocab_size - going_on
    return WordEdges(continues=inner, open=letters)


def holds(tokens: tuple[int, ...], phrase: tuple[int, ...], edges: WordEdges) -> bool:
    """By cutting the text into words."""
    words: list[tuple[int, ...]] = []
    for token in tokens:
        if words and bool(edges.open[words[-1][-1]]) and bool(edges.continues[token]):
            words[-1] += (token,)
        else:
            words.append((token,))
    wanted = [w for w in range(len(words)) for end in range(w, len(words)) if sum(words[w : end + 1], ()) == phrase]
    return bool(wanted)


@pytest.mark.parametrize("seed", range(20))
def test_missing_as_by_cutting_into_words(seed: int) -> None:
    choose = random.Random(seed)
    edges = make_edges(8, 2)
    found = 0
    for _ in range(300):
        tokens = tuple(choose.randrange(4, 8) for _ in range(choose.randint(1, 6)))
        phrase = (choose.randrange(4, 6), *(choose.randrange(4, 8) for _ in range(choose.randint(0, 2))))
        assert (missing(tokens, 0, [phrase], edges) == []) == holds(tokens, phrase, edges)
        found += holds(tokens, phrase, edges)
    assert found > 20


@pytest.mark.parametrize("seed", range(30))
def test_exhaustive_width_finds_the_best_that_hold_all(seed: int) -> None:
    """Width enough for every hypothesis: the answers are those of brute force among the sequences that hold all."""
    choose = random.Random(seed)
    limit, vocab_size = 4, 6
    model = make_language_model(seed, vocab_size=vocab_size, cell=choose.choice(["lstm", "gru"]), scale=2.0)
    edges = make_edges(vocab_size, 1)
    phrases: Phrases = choose.choice(
        [[(4,)], [(4, 5)], [(4,), (4, 5)], [(4, 4)], [(4, 5, 4)], [(4, 5), (4, 5)], [(5,)], [(5, 4)], [(5, 5), (4,)]]
    )  # 5 goes on with a word that stands before it

    def banned(tokens: tuple[int, ...]) -> list[int]:
        return [EOS] if missing(tokens, 0, phrases, edges) else []

    params = SearchParams(
        num_beams=vocab_size**limit,
        num_return_sequences=10,
        max_new_tokens=limit,
        length_penalty=choose.choice([-1.0, 0.0, 1.0]),
        early_stopping=False,
        force_words=("unused",),
    )
    everything = [
        one
        for one in brute_force(Table(model, limit), params, banned)
        if one.score > -float("inf") and not missing(one.tokens, 0, phrases, edges)
    ]
    request = Request("one", None, params, force_words=tuple(map(tuple, phrases)))
    (found,) = generate(model, [request], max_rows=10_000, edges=edges)
    assert [(tuple(h.tokens), h.score) for h in found] == [(one.tokens, float(one.score)) for one in everything[:10]]


@pytest.mark.parametrize("seed", range(20))
def test_every_output_holds_what_it_can(seed: int) -> None:
    """Narrow beams, several phrases, room for little more than them: held in every output; alone as in company."""
    choose = random.Random(seed)
    vocab_size = 24
    model = make_language_model(seed, vocab_size=vocab_size, hidden_size=16, scale=3.0)
    edges = make_edges(vocab_size, 8)
    requests = []
    for i in range(20):
        phrases = tuple(
            (choose.randrange(4, 16), *(choose.randrange(4, vocab_size) for _ in range(choose.randint(0, 2))))
            for _ in range(choose.randint(1, 4))
        )
        width = choose.randint(2, 6)
        params = SearchParams(
            num_beams=width,
            num_return_sequences=choose.randint(1, width),
            max_new_tokens=sum(map(len, phrases)) + choose.randint(0, 6),
            early_stopping=choose.random() < 0.5,
            force_words=("unused",),
        )
        prefix = tuple(choose.randrange(4, vocab_size) for _ in range(choose.choice([0, 2])))
        requests.append(Request(str(i), None, params, prefix, force_words=phrases))
    plain = Request("plain", None, SearchParams(num_beams=4, max_new_tokens=8))
    together = generate(model, [*requests, plain], max_rows=1000, edges=edges)
    for request, found in zip(requests, together, strict=False):
        assert found
        for hypothesis in found:
            assert missing(hypothesis.tokens, len(request.prefix), request.force_words, edges) == []
            assert hypothesis.score == pytest.approx(sum(hypothesis.logprobs) / len(hypothesis.logprobs), rel=1e-5)
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
    assert together[-1] == generate(model, [plain], edges=edges)[0]


def test_standing_by_hand() -> None:
    """Tokens 4 to 7 are letters, 6 and 7 go on with a word; 0 writes no letter."""
    edges = WordEdges(continues=torch.arange(8) >= 6, open=torch.arange(8) >= 4)
    tokens = torch.tensor([[[4, 6], [0, 6], [4, 5], [5, 4]]])
    history = History(tokens, torch.tensor([2]), torch.tensor([2]))
    standing = Constraints([[(6,), (4, 7), (5,)]], edges).standing(history)
    assert standing.met[0].tolist() == [[False] * 3, [True, False, False], [False, False, True], [False, False, True]]
    assert standing.loose[0].tolist() == [[False] * 3, [True, False, False], [False, False, True], [False] * 3]
    assert standing.depth[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert standing.begin[0].tolist() == [[-1, 4, 5], [-1, 4, 5], [-1, 4, -1], [-1, 4, -1]]
    assert standing.wanted[0].tolist() == [[-1, 4, 5], [-1, 4, 5], [-1, 4, -1], [-1, 7, -1]]


def test_without_room_the_most_that_fits_is_answered() -> None:
    model = make_language_model(0, vocab_size=12, scale=2.0)
    edges = make_edges(12, 0)
    params = SearchParams(num_beams=3, num_return_sequences=3, max_new_tokens=3, force_words=("unused",))
    request = Request("one", None, params, force_words=((4, 5), (6, 7)))
    (found,) = generate(model, [request], edges=edges)
    assert found and all(h.finish_reason == "length" for h in found)
    assert all(missing(h.tokens, 0, request.force_words, edges) for h in found)


def test_a_banned_forced_word_is_reported_missing() -> None:
    model = make_language_model(0, vocab_size=12, scale=2.0)
    edges = make_edges(12, 0)
    params = SearchParams(num_beams=3, num_return_sequences=3, max_new_tokens=6, force_words=("unused",))
    request = Request("one", None, params, bad_words=((4,),), force_words=((4,), (5,)))
    (found,) = generate(model, [request], edges=edges)
    assert found and all(missing(h.tokens, 0, request.force_words, edges) == [0] for h in found[:1])
