"""Going on from a saved state equals, bit for bit, never having stopped; and nothing but such a state gets in."""

import base64
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.decoding.saved import Maker, Position, SavedState
from seqmodels.decoding.search import Hypothesis
from seqmodels.errors import InputError
from seqmodels.models import SequenceGenerator
from seqmodels.selftest import find_row_floor
from seqmodels.state import State
from seqmodels.tokenizer import EOS
from tests.seqmodels.builders import RECURRENCES, make_language_model, make_translator

LENGTH = 12
MODELS: dict[str, Callable[[], SequenceGenerator]] = {
    "LSTM": lambda: make_language_model(5, vocab_size=40, hidden_size=16),
    "GRU, two layers": lambda: make_language_model(
        6, vocab_size=40, recurrent={"cell": "gru", "hidden_size": 16, "num_layers": 2}
    ),
    "RNN, three layers": lambda: make_language_model(
        7, vocab_size=40, recurrent={"cell": "rnn_tanh", "hidden_size": 16, "num_layers": 3}
    ),
    "normalised LSTM with zoneout, two layers": lambda: make_language_model(
        8, vocab_size=40, recurrent={**RECURRENCES["normalised LSTM, zoneout"], "hidden_size": 16, "num_layers": 2}
    ),
    "minLSTM, two layers": lambda: make_language_model(
        9, vocab_size=40, recurrent={"cell": "min_lstm", "hidden_size": 16, "num_layers": 2}
    ),
    "translator, LSTM, two layers": lambda: make_translator(3, num_layers=2),
    "translator, GRU, additive": lambda: make_translator(2, cell="gru", attention="additive"),
    "translator, no attention": lambda: make_translator(4, attention="none"),
}
HISTORY = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, with history": HISTORY,
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "sampled, with history": {**HISTORY, "do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 10},
}


def limited(options: dict[str, Any], start: int, end: int) -> SearchParams:
    """The options for the tokens from start to end of a longer run: limits count for each call."""
    least = max(0, options.get("min_new_tokens", 0) - start)
    return SearchParams(**{**options, "max_new_tokens": end - start, "min_new_tokens": least})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_cut_at_every_point(make: Callable[[], SequenceGenerator], options: dict[str, Any]) -> None:
    model = make()
    floor = find_row_floor(model)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    inputs = torch.tensor([7, 9, 11, 5]) if model.config.encoder else None
    request = Request("whole", inputs, limited(options, 0, LENGTH), (8, 9, 30), bad_words=((12,), (15, 9)), seed=3)
    whole = generate(model, [request], row_floor=floor)[0]
    # Attention for 3 outputs may give other last bits than for 1, so there the request that goes on is as wide.
    narrow = {} if model.decoder.attention else {"num_return_sequences": 1}
    cuts = range(max(1, request.params.min_new_tokens), LENGTH)  # a run of as many as it must write may end with EOS
    firsts = generate(
        model,
        [replace(request, id=str(n), params=limited(options, 0, n), return_state=True) for n in cuts],
        row_floor=floor,
    )
    rest = [
        replace(
            request,
            id=f"{n} {k}",
            params=limited({**options, **narrow}, first.state.position.step, LENGTH),
            prefix=first.state.tokens,
            state=first.state,
            seed=first.state.position.seed,
        )
        for n, outputs in zip(cuts, firsts, strict=True)
        for k, first in enumerate(outputs)
        if first.state
    ]
    continued = iter(generate(model, rest, row_floor=floor))
    assert len(rest) == len(whole) * len(cuts)
    for outputs in firsts:
        for first, uncut in zip(outputs, whole, strict=True):
            after = next(continued)[0]
            assert after.tokens == uncut.tokens
            assert after.finish_reason == uncut.finish_reason
            before = first.logprobs if first.finish_reason == "length" else first.logprobs[:-1]  # EOS is not kept
            assert before + after.logprobs == uncut.logprobs
            assert after.score == score(after)
            assert uncut.score == score(replace(uncut, logprobs=before + after.logprobs))


def score(hypothesis: Hypothesis) -> float:
    """The rule: what is new counts, summed from left to right, over its length."""
    total = torch.tensor(0.0)
    for logprob in hypothesis.logprobs:
        total += logprob
    return float(total / len(hypothesis.logprobs))


def test_a_cut_of_a_cut() -> None:
    """One token a call, from state to state, is the run of ten tokens; with text between, draws still go on."""
    model = make_language_model(5, vocab_size=40, hidden_size=16, scale=1.0)
    options = {"do_sample": True}
    request = Request("a", None, limited(options, 0, 10), (5, 6), bad_words=((EOS,),), seed=3)
    (whole,) = generate(model, [request])[0]
    one = replace(request, params=limited(options, 0, 1), return_state=True)
    tokens: list[int] = []
    for _ in range(10):
        (output,) = generate(model, [one])[0]
        tokens += output.generated
        assert output.state
        one = replace(one, prefix=output.state.tokens, state=output.state)
    assert tokens == whole.generated
    assert output.state and output.state.position.step == output.state.position.num_generated == 10
    more = replace(one, prefix=(*output.state.tokens, 7, 8))
    (output,) = generate(model, [more])[0]
    assert output.state and (output.state.position.step, output.state.position.num_generated) == (11, 1)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_beams_begin_anew_from_a_state(make: Callable[[], SequenceGenerator]) -> None:
    """The states of all returned hypotheses, finished early or late, are those of their tokens as a prefix."""
    model = make()
    inputs = torch.tensor([7, 9, 11, 5]) if model.config.encoder else None
    beams = SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=9)
    outputs = generate(model, [Request("a", inputs, beams, (8, 9), return_state=True)])[0]
    assert len(outputs) == 4
    for output in outputs:
        assert output.state
        kept = tuple(output.tokens[:-1] if output.finish_reason == "eos" else output.tokens)
        assert output.state.tokens == kept
        request = Request("b", inputs, beams, (*kept, 6), return_state=True)
        assert generate(model, [replace(request, state=output.state)])[0] == [
            replace(h, state=expected_state(h, output.state)) for h in generate(model, [request])[0]
        ]


def expected_state(hypothesis: Hypothesis, before: SavedState) -> SavedState:
    """The state of a run that did not go on from another, with the steps of what it would have gone on from."""
    assert hypothesis.state
    at, earlier = hypothesis.state.position, before.position
    moved = at.model_copy(update={"step": at.step + earlier.step, "output": at.output + earlier.output})
    return replace(hypothesis.state, position=moved)


def test_forks_draw_differently() -> None:
    model = make_language_model(5, vocab_size=40, hidden_size=16, scale=0.5)
    params = SearchParams(do_sample=True, max_new_tokens=10, min_new_tokens=10)
    (first,) = generate(model, [Request("a", None, params, seed=1, return_state=True)])[0]
    assert first.state
    forks = [Request(str(i), None, params, first.state.tokens, seed=i, state=first.state) for i in range(5)]
    outputs = [hs[0] for hs in generate(model, forks)]
    assert len({tuple(output.generated) for output in outputs}) == 5
    assert {tuple(output.tokens[:10]) for output in outputs} == {tuple(first.tokens)}
    three = SearchParams(do_sample=True, num_return_sequences=3, max_new_tokens=10, min_new_tokens=10)
    several = generate(model, [replace(forks[1], params=three)])[0]
    assert several[0].tokens == outputs[1].tokens
    assert len({tuple(output.tokens) for output in several}) == 3


def test_who_leaves_while_its_outputs_are_read_again() -> None:
    model = make_language_model(5, vocab_size=40, hidden_size=16)
    beams = SearchParams(num_beams=3, num_return_sequences=3, max_new_tokens=40, min_new_tokens=40)
    engine = Engine(model)
    engine.submit(Request("a", None, beams, return_state=True))
    while engine._lanes or not engine._leavers:
        assert engine.step() == []
    assert engine.num_rows == 3
    engine.cancel("a")
    assert not engine.has_work and engine.num_rows == 0


def test_the_engine_refuses_what_does_not_fit() -> None:
    model = make_translator(1)
    params, inputs = SearchParams(max_new_tokens=3, min_new_tokens=3), torch.tensor([5, 6])
    state = generate(model, [Request("a", inputs, params, return_state=True)])[0][0].state
    assert state
    engine = Engine(model)
    with pytest.raises(InputError, match="other inputs"):
        engine.submit(Request("a", torch.tensor([5, 7]), params, state.tokens, state=state))
    with pytest.raises(InputError, match="does not begin with its tokens"):
        engine.submit(Request("a", inputs, params, state.tokens[1:], state=state))
    with pytest.raises(InputError, match="does not fit the model"):
        wide = replace(state, values=state.values + b"1234")
        engine.submit(Request("a", inputs, params, state.tokens, state=wide))


@pytest.fixture(scope="module")
def state() -> SavedState:
    model = make_language_model(5, vocab_size=40, hidden_size=16)
    params = SearchParams(max_new_tokens=5, min_new_tokens=5)
    found = generate(model, [Request("a", None, params, (4, 5), seed=9, return_state=True)])[0][0].state
    assert found
    return found


MAKER = Maker(revision="1f3a", decoder_weights="float32")


def parsed(data: bytes, width: int = 32, **maker: Any) -> SavedState:
    return SavedState.from_bytes(data, MAKER.model_copy(update=maker), width, vocab_size=40)


def test_bytes_hold_all_of_it(state: SavedState) -> None:
    assert parsed(state.to_bytes(MAKER)) == state
    empty = replace(state, tokens=(), position=state.position.model_copy(update={"num_generated": 0}))
    assert parsed(empty.to_bytes(MAKER)) == empty


def test_a_state_by_the_first_program_that_wrote_them_is_read() -> None:
    first = SavedState(
        (4, 5, 7),
        State(torch.tensor([[0.5, -0.25]])).to_bytes(),
        Position(num_generated=1, step=1, output=0, seed=9, inputs=""),
    )
    assert parsed(base64.b64decode(WRITTEN), width=2) == first
    assert first.to_bytes(MAKER) == base64.b64decode(WRITTEN)


WRITTEN = (
    "oAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJzdGF0ZSI6IntcInZlcnNpb25cIjoxLFwibWFrZXJcIjp7XCJyZXZpc2lvblwiOlwi"
    "MWYzYVwiLFwiZGVjb2Rlcl93ZWlnaHRzXCI6XCJmbG9hdDMyXCIsXCJzaG9ydGxpc3RcIjpcIlwifSxcImF0XCI6e1wibnVtX2dl"
    "bmVyYXRlZFwiOjEsXCJzdGVwXCI6MSxcIm91dHB1dFwiOjAsXCJzZWVkXCI6OSxcImlucHV0c1wiOlwiXCJ9LFwiY2hlY2tzdW1c"
    "IjpcImE4MDMyZmUzYjY1MTk0NDZjZWEyOTIyMmVjNWZlZDAwZDVmNWY4NTY0ZTk3NWJlOTJiYzA1ODU1MDYxNzVkYzdcIn0ifSwi"
    "dG9rZW5zIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOlszXSwiZGF0YV9vZmZzZXRzIjpbMCwyNF19LCJ2YWx1ZXMiOnsiZHR5cGUi"
    "OiJGMzIiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOlsyNCwzMl19fSAgICAgIAQAAAAAAAAABQAAAAAAAAAHAAAAAAAAAAAA"
    "AD8AAIC+"
)


def test_what_does_not_fit_is_named(state: SavedState) -> None:
    data = state.to_bytes(MAKER)
    with pytest.raises(InputError, match="1f3a in float32 with no shortlist, but this one is 9999 in float32") as error:
        parsed(data, revision="9999")
    assert error.value.param == "state"
    with pytest.raises(InputError, match="but this one is 1f3a in int8"):
        parsed(data, decoder_weights="int8")
    with pytest.raises(InputError, match="with no shortlist, but this one is 1f3a in float32 with shortlist 77ab"):
        parsed(data, shortlist="77ab")
    shortened = state.to_bytes(MAKER.model_copy(update={"shortlist": "77ab"}))
    assert parsed(shortened, shortlist="77ab") == state
    for other in ("", "88cd"):
        with pytest.raises(InputError, match="with shortlist 77ab, but this one is"):
            parsed(shortened, shortlist=other)
    with pytest.raises(InputError, match="64 finite numbers"):
        parsed(data, width=64)
    with pytest.raises(InputError, match="none of this model's 40 tokens"):
        parsed(replace(state, tokens=(4, 40, *state.tokens[2:])).to_bytes(MAKER))
    with pytest.raises(InputError, match="none of this model's 40 tokens"):
        parsed(replace(state, tokens=(4, -1, *state.tokens[2:])).to_bytes(MAKER))
    with pytest.raises(InputError, match="32 finite numbers"):
        parsed(replace(state, values=state.values[:-4] + b"\x00\x00\xc0\x7f").to_bytes(MAKER))
    with pytest.raises(InputError, match="5 of its 3 tokens"):
        parsed(replace(state, tokens=state.tokens[:3]).to_bytes(MAKER))
    with pytest.raises(InputError, match="version 7, but this program knows version 1"):
        parsed(data.replace(b'\\"version\\":1', b'\\"version\\":7'))
    for broken in (b"", b"{}", b"\xff" * 100, data[:-1], data + b"0", save({"values": torch.zeros(32)})):
        with pytest.raises(InputError, match="damaged or no state"):
            parsed(broken)
    tensors, about = load(data), {"state": "[" * 100_000}
    with pytest.raises(InputError, match="damaged or no state"):
        parsed(save(tensors, about))


def test_damage_is_seen(state: SavedState) -> None:
    """3,000 states with bytes changed, cut out or put in: an error, or a change that says the same."""
    data, choose = state.to_bytes(MAKER), random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 1, 3])):
            at = choose.randrange(len(damaged))
            kind = choose.random()
            if kind < 0.6:
                damaged[at] ^= 1 << choose.randrange(8)
            elif kind < 0.8:
                del damaged[at : at + choose.randint(1, 20)]
            else:
                damaged[at:at] = choose.randbytes(choose.randint(1, 20))
        try:
            assert parsed(bytes(damaged)) == state
        except InputError as error:
            assert error.param == "state"
            refused += 1
    assert refused > 2900
