"""The engine: a request's answer is the same alone, in any batch, slot or order of arrival, to the last bit."""

import random
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from seqmodels.config import Weights
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.lane import Lane
from seqmodels.decoding.padding import bucket
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.random import gumbel
from seqmodels.decoding.request import Event, Failed, Finished, Progress, Request
from seqmodels.decoding.search import Hypothesis
from seqmodels.decoding.waiting import Bounds
from seqmodels.errors import DeadlineError, InputError, QueueFullError
from seqmodels.models import SequenceGenerator
from seqmodels.selftest import find_row_floor
from seqmodels.stepper import Decodes, Group, Stepper
from seqmodels.tokenizer import EOS
from tests.seqmodels.builders import UNFUSED, make_first_looking, make_language_model, make_translator


def random_params(choose: random.Random, attends: bool) -> SearchParams:
    width = choose.choice([1, 1, 2, 3, 5])
    fields = {
        "max_new_tokens": choose.randint(1, 12),
        "repetition_penalty": choose.choice([1.0, 1.0, 1.3]),
        "no_repeat_ngram_size": choose.choice([0, 0, 1, 2, 3]),
        "logprobs": True,
        "top_logprobs": choose.choice([0, 0, 1, 5, 20]),
        "output_attentions": attends and choose.random() < 0.4,
    }
    fields["min_new_tokens"] = choose.choice([0, 0, min(3, fields["max_new_tokens"])])
    if choose.random() < 0.35:
        fields |= {
            "do_sample": True,
            "num_return_sequences": width,
            "temperature": choose.choice([1.0, 0.7, 1.5]),
            "top_k": choose.choice([0, 0, 3, 10]),
            "top_p": choose.choice([1.0, 0.9, 0.5]),
        }
    else:
        fields |= {
            "num_beams": width,
            "num_return_sequences": choose.randint(1, width),
            "early_stopping": choose.random() < 0.5,
            "length_penalty": choose.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
            "coverage_penalty": choose.choice([0.0, 0.0, 0.2, 1.0]) if attends and width > 1 else 0.0,
        }
    return SearchParams(**fields)


def random_request(choose: random.Random, name: str, model: SequenceGenerator | Decodes, longest: int = 40) -> Request:
    assert model.config.decoder is not None
    vocab_size = model.config.decoder.vocab_size
    inputs = None
    if model.config.encoder is not None:
        inputs = torch.tensor([choose.randrange(vocab_size) for _ in range(choose.randint(1, longest))])
    words = tuple(
        tuple(choose.randrange(4, vocab_size) for _ in range(choose.choice([1, 1, 2])))
        for _ in range(choose.choice([0, 0, 2]))
    )
    prefix = random_prefix(choose, vocab_size)
    attends = model.decoder.attention is not None if isinstance(model, SequenceGenerator) else model.output_attentions
    params, force_words = random_params(choose, attends), ()
    if params.num_beams > 1 and choose.random() < 0.3:
        force_words = tuple(
            tuple(choose.randrange(4, vocab_size) for _ in range(choose.randint(1, 3)))
            for _ in range(choose.randint(1, 3))
        )
    shortlist = None
    if inputs is not None and choose.random() < 0.3:
        forced = {token for phrase in force_words for token in phrase}
        shortlist = torch.tensor(sorted({EOS, *forced, *choose.sample(range(4, vocab_size), choose.randint(3, 20))}))
    return Request(
        name,
        inputs,
        params,
        prefix,
        bad_words=words,
        force_words=force_words,
        shortlist=shortlist,
        seed=choose.randrange(2**62),
        stream=choose.random() < 0.3,
        return_state=choose.random() < 0.25,
    )


def random_bank(
    choose: random.Random, model: SequenceGenerator | Decodes, floor: int, count: int, longest: int = 40
) -> tuple[list[Request], list[list[Hypothesis]]]:
    """Requests, some of which go on from outputs of others, and the answer of each when it comes alone."""
    bank = [random_request(choose, str(i), model, longest) for i in range(count)]
    expected = [generate(model, [request], row_floor=floor)[0] for request in bank]
    ends = [(request, h.state) for request, hs in zip(bank, expected, strict=True) for h in hs if h.state]
    for request, state in choose.sample(ends, min(len(ends), count // 5)):
        other = random_request(choose, f"{request.id}, continued {len(bank)}", model)
        prefix = state.tokens + choose.choice([(), other.prefix])
        bank.append(replace(other, inputs=request.inputs, prefix=prefix, state=state))
        expected.append(generate(model, bank[-1:], row_floor=floor)[0])
    return bank, expected


def random_prefix(choose: random.Random, vocab_size: int) -> tuple[int, ...]:
    """None, a short one, or one read over several turns, which often begins as others do."""
    length = choose.choice([0, 0, 0, 1, 4, choose.randint(9, 80)])
    if length > 4 and choose.random() < 0.7:
        common = [4 + i % (vocab_size - 4) for i in range(choose.randint(1, length))]
        return (*common, *(choose.randrange(4, vocab_size) for _ in range(length - len(common))))
    return tuple(choose.randrange(4, vocab_size) for _ in range(length))


def run_schedule(
    choose: random.Random, model: SequenceGenerator | Decodes, floor: int, bank: list[Request], expected: list[object]
) -> None:
    """Requests arrive at random steps at an engine with random room; some leave before they are done."""
    rows, positions, states = choose.randint(6, 40), choose.choice([12, 100, 4096]), choose.choice([0, 2, 1024])
    engine = Engine(model, max_rows=rows, max_positions_per_step=positions, row_floor=floor, prefix_cache_states=states)
    picked = choose.sample(range(len(bank)), choose.randint(3, 9))
    arrivals = sorted((choose.randint(0, 12), i) for i in picked)
    cancelled = {bank[i].id: choose.randint(0, 15) for i in picked if choose.random() < 0.15}
    answers: dict[str, object] = {}
    step = 0
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][0] <= step:
            engine.submit(bank[arrivals.pop(0)[1]])
        for name in [name for name, when in cancelled.items() if when == step]:
            engine.cancel(name)
        for event in engine.step():
            if isinstance(event, Finished):
                answers[event.request_id] = event.result
        step += 1
    assert engine.num_rows == 0
    for i in picked:
        if bank[i].id in answers:
            assert answers[bank[i].id] == expected[i], bank[i]
        else:
            assert bank[i].id in cancelled


def make_unfused(recurrent: dict[str, Any]) -> SequenceGenerator:
    """Of two layers, the first of which looks its input up."""
    return make_language_model(8, vocab_size=40, recurrent={**recurrent, "hidden_size": 16, "num_layers": 2})


SMALL_MODELS = [
    ("translator, LSTM", lambda: make_translator(1)),
    ("translator, additive, GRU", lambda: make_translator(2, attention="additive", cell="gru")),
    ("translator, dot, two layers", lambda: make_translator(3, attention="dot", num_layers=2)),
    ("translator, no attention", lambda: make_translator(4, attention="none")),
    ("translator, looks from the first layer", lambda: make_first_looking(1)),
    ("language model", lambda: make_language_model(5, vocab_size=40, hidden_size=16)),
]
UNFUSED_MODELS = [
    ("translator, normalised LSTM", lambda: make_translator(6, layer_norm=True, zoneout=0.1, cell_zoneout=0.4)),
    ("translator, minLSTM", lambda: make_translator(7, cell="min_lstm", num_layers=2)),
    *((f"two layers, {name}", partial(make_unfused, fields)) for name, fields in UNFUSED.items()),
]


@pytest.mark.parametrize("make", [make for _, make in SMALL_MODELS], ids=[name for name, _ in SMALL_MODELS])
def test_a_busy_engine_changes_no_bit(make) -> None:  # type: ignore[no-untyped-def]
    """200 random schedules for each of five models: mixed widths, options, lengths, arrivals and cancels."""
    model = make()
    floor = find_row_floor(model)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    choose = random.Random(0)
    bank, expected = random_bank(choose, model, floor, 60)
    assert len({str(answer) for answer in expected}) > 50  # the bank is no collection of equal answers
    for _ in range(200):
        run_schedule(choose, model, floor, bank, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("make", [make for _, make in UNFUSED_MODELS], ids=[name for name, _ in UNFUSED_MODELS])
def test_a_busy_engine_changes_no_bit_without_a_fused_kernel(make, weights: Weights) -> None:  # type: ignore[no-untyped-def]
    """40 schedules for each kind of recurrence, with beams that read prefixes over several turns."""
    model = make()
    stepper = Stepper(model, weights)
    floor = find_row_floor(model, stepper)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    choose = random.Random(4)
    bank, expected = random_bank(choose, stepper, floor, 24)
    for _ in range(40):
        run_schedule(choose, stepper, floor, bank, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [make for _, make in SMALL_MODELS], ids=[name for name, _ in SMALL_MODELS])
def test_company_changes_no_answer(make) -> None:  # type: ignore[no-untyped-def]
    """As above but for the last bits, so that it also holds, and never skips, where those vary with the batch."""
    model, choose = make(), random.Random(3)
    bank = [random_request(choose, str(i), model) for i in range(40)]
    for request, together in zip(bank, generate(model, bank, max_rows=200), strict=True):
        (alone,) = generate(model, [request])
        assert [h.tokens for h in alone] == [h.tokens for h in together]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_busy_engine_changes_no_bit_at_real_size(weights: Weights) -> None:
    """LSTM 512, vocabulary 7,700, memories across buckets: 50 schedules."""
    translator = make_translator(0, vocab_size=7700, hidden_size=512, embedding_size=256, scale=1.2)
    model = Stepper(translator, weights)
    floor = find_row_floor(translator, model)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    choose = random.Random(1)
    bank, expected = random_bank(choose, model, floor, 24, longest=70)
    for _ in range(50):
        run_schedule(choose, model, floor, bank, expected)  # type: ignore[arg-type]


def run(engine: Engine, *requests: Request) -> list[Event]:
    for request in requests:
        engine.submit(request)
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def result(events: list[Event], name: str) -> list[Hypothesis]:
    (found,) = [e.result for e in events if isinstance(e, Finished) and e.request_id == name]
    assert isinstance(found, list)
    return found


def test_what_was_streamed_is_a_prefix_of_the_result() -> None:
    model = make_translator(1, scale=2.0)
    choose = random.Random(2)
    streamed_early = 0
    for i in range(80):
        request = random_request(choose, "a", model)
        request = replace(request, id="a", stream=True)
        events = run(Engine(model), request)
        outputs = result(events, "a")
        pieces: dict[int, list[int]] = {}
        for event in events:
            if isinstance(event, Progress):
                pieces.setdefault(event.index, []).extend(event.tokens)
        streamed_early += sum(map(len, pieces.values())) if request.params.num_beams > 1 else 0
        for index, tokens in pieces.items():
            assert outputs[index].generated[: len(tokens)] == tokens, i
        if request.params.num_beams == 1:
            assert [pieces[k] for k in range(len(outputs))] == [h.generated for h in outputs]
    assert streamed_early > 50  # beams do stream before the end


def test_what_is_read_of_a_copy_is_what_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a search on a GPU: the same events in the same order, of requests that stream, watch and end together."""
    model, choose = make_translator(1, scale=2.0), random.Random(3)

    def watch(index: int, tokens: Any) -> bool:
        return index == 0 and len(tokens) == 3

    requests = [random_request(choose, str(i), model) for i in range(80)]
    requests = [replace(request, watch=watch if i % 3 == 0 else None) for i, request in enumerate(requests)]
    here = run(Engine(model, max_rows=40), *requests)
    monkeypatch.setattr(Lane, "readable", Lane.copied)
    assert run(Engine(model, max_rows=40), *requests) == here
    assert sum(isinstance(event, Progress) for event in here) > 20


def test_settled_tokens_of_beams_never_change() -> None:
    """At every step, not only at the end: what is settled now begins with what was settled before."""
    model = make_translator(7, scale=2.5)
    for seed in range(20):
        params = SearchParams(num_beams=4, max_new_tokens=15, early_stopping=False)
        engine = Engine(model)
        engine.submit(Request("a", torch.tensor([seed % 40, 5, 6]), params))
        settled: list[int] = []
        while True:
            events = engine.step()
            if not engine.has_work:
                break
            (lane,) = engine._lanes.values()
            (now,) = lane.search.settled(0)
            assert now[: len(settled)] == settled
            settled = now
        assert result(events, "a")[0].tokens[: len(settled)] == settled


def test_sampling_follows_the_distribution() -> None:
    """Chi-square of 4,000 first tokens against the model's own probabilities."""
    model = make_language_model(11, vocab_size=8, scale=1.5)
    params = SearchParams(do_sample=True, num_return_sequences=100, max_new_tokens=1)
    requests = [Request(str(seed), None, params, seed=seed) for seed in range(40)]
    firsts = torch.tensor([h.tokens[0] for hs in generate(model, requests, max_rows=4000) for h in hs])
    with torch.inference_mode():
        (logits,), _, _ = Stepper(model).step(torch.full((4,), 2), model.start(None, 4), [Group(4, 1)])
    expected = logits[0, 0].softmax(-1) * len(firsts)
    counts = torch.bincount(firsts, minlength=8)
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # 7 degrees of freedom, p = 0.001


def test_seeds_decide_samples() -> None:
    model = make_language_model(12, vocab_size=30, scale=0.5)
    params = SearchParams(do_sample=True, num_return_sequences=4, max_new_tokens=10)

    def sample(seed: int) -> list[list[int]]:
        return [h.tokens for h in generate(model, [Request("a", None, params, seed=seed)])[0]]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len({tuple(tokens) for tokens in sample(1)}) == 4
    two = SearchParams(do_sample=True, num_return_sequences=2, max_new_tokens=10)
    assert [h.tokens for h in generate(model, [Request("a", None, two, seed=1)])[0]] == sample(1)[:2]


def test_watch_ends_an_output_where_it_says() -> None:
    model = make_language_model(13, vocab_size=30, scale=0.5)
    params = SearchParams(do_sample=True, num_return_sequences=3, max_new_tokens=20, min_new_tokens=20)
    free = generate(model, [Request("a", None, params, seed=4)])[0]
    stopped = generate(
        model, [Request("a", None, params, seed=4, watch=lambda index, tokens: index == 1 and len(tokens) == 5)]
    )[0]
    assert stopped[1].tokens == free[1].tokens[:5]
    assert stopped[1].finish_reason == "stop"
    assert [stopped[0], stopped[2]] == [free[0], free[2]]


def test_deadlines_and_cancels_free_rows() -> None:
    model = make_language_model(14, vocab_size=30)
    long = SearchParams(max_new_tokens=50, min_new_tokens=50, num_beams=4)
    engine = Engine(model, max_rows=8)
    for name in "abc":
        engine.submit(Request(name, None, long))
    engine.submit(Request("late", None, long, deadline=time.monotonic() - 1))
    events = engine.step()
    assert [e.request_id for e in events if isinstance(e, Failed) and isinstance(e.error, DeadlineError)] == ["late"]
    assert (engine.num_rows, engine.num_waiting) == (8, 1)
    engine.cancel("a")
    assert engine.num_rows == 4
    engine.step()
    assert (engine.num_rows, engine.num_waiting) == (8, 0)
    engine.cancel("b")
    engine.cancel("c")
    assert not engine.has_work


def test_a_running_request_expires() -> None:
    model = make_language_model(14, vocab_size=30)
    engine = Engine(model)
    params = SearchParams(max_new_tokens=10_000, min_new_tokens=10_000)
    engine.submit(Request("a", None, params, deadline=time.monotonic() + 0.05))
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    assert [type(e) for e in events] == [Failed]
    assert engine.num_rows == 0


def test_only_a_share_of_the_rows_is_given_but_to_one_who_is_alone() -> None:
    engine = Engine(make_language_model(14, vocab_size=30), max_rows=8)
    for name in "abcd":
        engine.submit(Request(name, None, SearchParams(max_new_tokens=50, min_new_tokens=50, num_beams=2)))
    engine.step(Bounds(share=0.5))
    assert (engine.num_rows, engine.num_waiting) == (4, 2)
    engine.step(Bounds(share=0.1))  # nobody loses rows
    assert (engine.num_rows, engine.num_waiting) == (4, 2)
    engine.cancel("a")
    engine.cancel("b")
    engine.step(Bounds(share=0.1))
    assert (engine.num_rows, engine.num_waiting) == (2, 1)


def test_a_short_request_is_not_given_up_for_what_long_ones_take() -> None:
    engine = Engine(make_language_model(14, vocab_size=30), max_rows=1)
    now = time.monotonic()
    for name, tokens in {"runs": 50, "short": 4, "in vain": 50}.items():
        params = SearchParams(max_new_tokens=tokens, min_new_tokens=tokens)
        engine.submit(Request(name, None, params, deadline=now + 60 if tokens == 4 or name == "in vain" else now + 50))
    told = engine.step(Bounds(needs_s=120, turn_s=10))  # the short one takes 5 turns at most, with the one that goes on
    assert [event.request_id for event in told] == ["in vain"]
    assert engine.num_waiting == 1
    told = engine.step(Bounds(needs_s=120, turn_s=13))
    assert [event.request_id for event in told if isinstance(event, Failed)] == ["short"]
    assert isinstance(told[0], Failed) and isinstance(told[0].error, QueueFullError)
    assert told[0].error.retry_after_s == 65 and not engine.num_waiting


def test_who_waits_in_vain_is_told_and_who_has_rows_goes_on() -> None:
    engine = Engine(make_language_model(14, vocab_size=30), max_rows=2)
    params, now = SearchParams(max_new_tokens=4, min_new_tokens=4), time.monotonic()
    for name, seconds in {"runs": 60, "runs too": 61, "in vain": 62, "patient": 900}.items():
        engine.submit(Request(name, None, params, deadline=now + seconds))
    told = engine.step(Bounds(needs_s=120))
    assert [event.request_id for event in told] == ["in vain"]
    assert isinstance(told[0], Failed) and isinstance(told[0].error, QueueFullError)
    assert told[0].error.retry_after_s == 120
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    assert {event.request_id for event in events if isinstance(event, Finished)} == {"runs", "runs too", "patient"}


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(make_language_model(0), max_rows=4)
    with pytest.raises(InputError, match="num_beams is 5, but this engine has 4 rows"):
        engine.submit(Request("a", None, SearchParams(num_beams=5)))
    with pytest.raises(InputError, match="max_new_tokens is 10000000000"):
        engine.submit(Request("a", None, SearchParams(max_new_tokens=10**10)))


def test_a_wide_request_at_the_head_is_not_overtaken() -> None:
    model = make_language_model(14, vocab_size=30)
    engine = Engine(model, max_rows=6)
    slow = SearchParams(max_new_tokens=8, min_new_tokens=8, num_beams=4)
    engine.submit(Request("first", None, slow))
    engine.step()
    engine.submit(Request("wide", None, slow))
    engine.submit(Request("narrow", None, SearchParams(max_new_tokens=1)))
    finished = [e.request_id for e in run(engine) if isinstance(e, Finished)]
    assert finished.index("first") < finished.index("narrow")


def test_draws_are_finite() -> None:
    """A float32 rounds up: with 24 bits and a half, one draw in 2 ** 24 was 1.0, and its noise infinite."""
    seeds, steps = torch.tensor([15, 2749]), torch.tensor([183, 0])
    assert gumbel(seeds, torch.arange(4).expand(2, -1), steps, 8000).isfinite().all()
    top = (torch.tensor(2**23 - 1).float() + 0.5) * 2.0**-23
    assert 0 < float(top) < 1


def test_draws_differ_by_seed_output_step_and_token() -> None:
    three = torch.arange(3).expand(3, -1)
    noise = gumbel(torch.tensor([1, 1, 2]), three, torch.tensor([5, 6, 5]), 50)
    assert len(set(noise.flatten().tolist())) == noise.numel()
    assert torch.equal(noise[0], gumbel(torch.tensor([1]), three[:1], torch.tensor([5]), 50)[0])  # by nothing else
    many = gumbel(torch.arange(400), torch.arange(2).expand(400, -1), torch.zeros(400, dtype=torch.int64), 50)
    assert abs(float(many.mean()) - 0.5772) < 0.02  # Euler's constant, the mean of a Gumbel variable
    assert abs(float(torch.corrcoef(many[:, 0].T.flatten(1))[0, 1:].mean())) < 0.05


def test_a_lane_forgets_a_long_request() -> None:
    """The tables that each step gathers shrink when the longest request leaves."""
    model = make_language_model(14, vocab_size=30)
    engine = Engine(model)
    engine.submit(Request("short", None, SearchParams(max_new_tokens=9, min_new_tokens=9, num_beams=2)))
    engine.submit(Request("long", None, SearchParams(max_new_tokens=5000, min_new_tokens=5000, num_beams=2)))
    engine.step()
    (lane,) = engine._lanes.values()
    assert lane.search.tokens.shape[2] == 5000
    engine.cancel("long")
    engine.step()
    assert lane.search.tokens.shape[2] == 9
    assert len(result(run(engine), "short")[0].tokens) == 9


def test_a_short_request_in_a_long_ones_place_needs_no_room() -> None:
    engine = Engine(make_language_model(14, vocab_size=30))
    short = SearchParams(max_new_tokens=9, min_new_tokens=9, num_beams=2)
    engine.submit(Request("short", None, short))
    engine.submit(Request("long", None, SearchParams(max_new_tokens=5000, min_new_tokens=5000, num_beams=2)))
    engine.step()
    engine.cancel("long")
    engine.submit(Request("newcomer", None, short))
    engine.step()
    (lane,) = engine._lanes.values()
    assert [request.id for _, request in lane.live] == ["short", "newcomer"]
    assert lane.search.tokens.shape[2] == 9


def test_buckets_cover_every_length() -> None:
    for length in range(1, 5000):
        assert length <= bucket(length) <= max(12, 2 * length)
    assert bucket(1025) == 2048


def test_memory_stays_flat_and_rows_return() -> None:
    """After many requests with random cancels nothing is left behind."""
    model = make_translator(1)
    choose = random.Random(5)
    engine = Engine(model, max_rows=24)
    for i in range(400):
        engine.submit(random_request(choose, str(i), model, longest=20))
        engine.step()
        if choose.random() < 0.3:
            engine.cancel(str(choose.randrange(i + 1)))
    while engine.has_work:
        engine.step()
    assert (engine.num_rows, engine.num_waiting, len(engine._lanes)) == (0, 0, 0)
    assert not engine._newcomers and not engine._leavers
    assert engine._state.num_rows <= 24
