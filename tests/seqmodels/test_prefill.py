"""Prefixes read over turns, and states shared between those who begin alike: the same bits, for less reading."""

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.prefill import BLOCK, ROWS, TOKENS, StateCache
from seqmodels.decoding.request import Event, Failed, Finished, Request
from seqmodels.decoding.search import Hypothesis
from seqmodels.models import SequenceGenerator
from seqmodels.selftest import find_row_floor
from seqmodels.state import State
from seqmodels.stepper import Groups, Stepper
from tests.seqmodels.builders import make_language_model, make_translator

VOCAB_SIZE = 40


def make_prefix(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple(4 + (first + i * i) % (VOCAB_SIZE - 4) for i in range(length))


def make_request(name: str, prefix: tuple[int, ...], **params: int) -> Request:
    return Request(name, None, SearchParams(max_new_tokens=4, **params), prefix)


@pytest.fixture
def model() -> SequenceGenerator:
    return make_language_model(5, vocab_size=VOCAB_SIZE, hidden_size=16)


def answers(engine: Engine) -> dict[str, list[Hypothesis]]:
    found = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Finished) and isinstance(event.result, list):
                found[event.request_id] = event.result
    return found


def test_reading_holds_nobody_up(model: SequenceGenerator) -> None:
    """Who runs gets a token in each turn while a long prefix is read, and its rows are held meanwhile."""
    engine = Engine(model, max_rows=5)
    engine.submit(replace(make_request("short", (), min_new_tokens=4), stream=True))
    engine.submit(make_request("long", make_prefix(10 * TOKENS), num_beams=4))
    for turn in range(1, 5):
        events = engine.step()
        assert [event.request_id for event in events] == ["short"] + ["short"] * (turn == 4)
        assert engine.prefill_tokens == (turn * TOKENS, 0)
        assert engine.num_rows == (5 if turn < 4 else 4)
    assert answers(engine)["long"] == generate(model, [make_request("long", make_prefix(10 * TOKENS), num_beams=4)])[0]
    assert engine.prefill_tokens == (10 * TOKENS, 0)


def test_prompts_that_only_go_on_alike_share_nothing(model: SequenceGenerator) -> None:
    """The second turn reads the same tokens in both, after others in the first."""
    prompts = [(first,) * (TOKENS - 1) + (20,) * (TOKENS + 1) for first in (10, 11)]
    engine = Engine(model)
    for prompt in prompts:
        engine.submit(make_request(str(prompt[0]), prompt))
    found = answers(engine)
    alone = {str(prompt[0]): generate(model, [make_request("a", prompt)])[0] for prompt in prompts}
    assert found == alone
    assert [h.logprobs for h in found["10"]] != [h.logprobs for h in found["11"]]
    assert engine.prefill_tokens == (4 * TOKENS, 0)


def test_many_read_in_their_turn(model: SequenceGenerator) -> None:
    engine = Engine(model, prefix_cache_states=0)
    for i in range(2 * ROWS):
        engine.submit(make_request(str(i), make_prefix(TOKENS, i)))
    finished = list(answers(engine))
    assert engine.prefill_tokens == (2 * ROWS * TOKENS, 0)
    assert set(finished[:ROWS]) == {str(i) for i in range(ROWS)}


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
def test_who_leaves_while_reading_frees_its_rows(model: SequenceGenerator, leave: str) -> None:
    engine = Engine(model)
    deadline = time.monotonic() + 0.05 if leave == "deadline" else None
    engine.submit(replace(make_request("a", make_prefix(20_000), num_beams=3), deadline=deadline))
    events: list[Event] = engine.step()
    assert engine.num_rows == 3
    if leave == "cancel":
        engine.cancel("a")
    while engine.has_work:
        events += engine.step()
    assert [type(event) for event in events] == [Failed] * (leave == "deadline")
    assert engine.num_rows == 0


def test_a_shared_prompt_is_read_once(model: SequenceGenerator) -> None:
    """500 tokens in common and 10 of each one's own: at once, one after the other, and to the last bit as without."""
    floor = find_row_floor(model)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    common = make_prefix(500)
    requests = [make_request(str(i), common + make_prefix(10, i), num_beams=2) for i in range(8)]
    alone = {request.id: generate(model, [request], row_floor=floor)[0] for request in requests}

    engine = Engine(model, row_floor=floor)
    for request in requests:
        engine.submit(request)
    assert answers(engine) == alone
    read, saved = engine.prefill_tokens
    assert read + saved == 8 * 510
    assert 500 <= read <= 500 + 8 * (10 + TOKENS)

    engine = Engine(model, row_floor=floor)
    for request in requests:
        engine.submit(request)
        assert answers(engine) == {request.id: alone[request.id]}
    assert engine.prefill_tokens[0] <= 510 + 7 * (10 + BLOCK)
    read, _ = engine.prefill_tokens
    engine.submit(requests[3])  # all of it was read before
    assert answers(engine) == {"3": alone["3"]}
    assert engine.prefill_tokens[0] == read

    engine = Engine(model, row_floor=floor, prefix_cache_states=0)
    for request in requests:
        engine.submit(request)
    assert answers(engine) == alone
    assert engine.prefill_tokens == (8 * 510, 0)


def test_a_state_that_depends_on_inputs_is_not_shared() -> None:
    """Neither with one that came before nor with one that comes at the same time."""
    model = make_translator(1)
    requests = [
        Request(str(i), torch.tensor([5 + i, 6]), SearchParams(max_new_tokens=4), make_prefix(2 * BLOCK))
        for i in range(3)
    ]
    alone = {request.id: generate(model, [request])[0] for request in requests}
    engine = Engine(model)
    engine.submit(requests[0])
    found = answers(engine)
    for request in requests[1:]:
        engine.submit(request)
    found |= answers(engine)
    assert {name: [h.tokens for h in hs] for name, hs in found.items()} == {
        name: [h.tokens for h in hs] for name, hs in alone.items()
    }
    assert engine.prefill_tokens == (6 * BLOCK, 0)


class Watched(Stepper):
    """Notes how many rows it reads at once; with `uneven`, rows get other numbers where they are many."""

    uneven = 0.0

    def read(self, tokens: Tensor, lengths: Tensor, state: State, groups: Groups = ()) -> State:
        self.rows = len(tokens)
        after = super().read(tokens, lengths, state, groups)
        return State(after.values + self.uneven * (len(tokens) > 16))


def test_few_rows_are_padded_to_the_floor(model: SequenceGenerator) -> None:
    for floor in (4, 8):
        watched = Watched(model)
        generate(watched, [make_request("a", make_prefix(5)), make_request("b", make_prefix(6))], row_floor=floor)
        assert watched.rows == floor


def test_the_self_test_sees_a_reading_that_depends_on_company(model: SequenceGenerator) -> None:
    watched = Watched(model)
    if find_row_floor(model, watched) is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    watched.uneven = 0.1
    assert find_row_floor(model, watched) is None


def test_the_cache_is_bounded_and_forgets_what_was_not_asked_for() -> None:
    cache, state = StateCache(3), State(torch.zeros(1, 4))
    prompts = [make_prefix(BLOCK, i) for i in range(4)]
    for prompt in prompts[:3]:
        cache.put(prompt, state)
    assert cache.longest((*prompts[0], 5)) == (BLOCK, state)
    cache.put(prompts[3], state)
    assert len(cache) == 3
    assert [cache.longest(prompt) is not None for prompt in prompts] == [True, False, True, True]
