"""What an answer tells beside its tokens, against whole forward passes; the coverage penalty against brute force."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqmodels.decoding.coverage import Coverage
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.decoding.search import Beams, Hypothesis
from seqmodels.errors import InputError
from seqmodels.models import SequenceGenerator
from seqmodels.stepper import Ensemble, Stepper
from tests.seqmodels import oracles
from tests.seqmodels.builders import make_first_looking, make_language_model, make_model, make_translator
from tests.seqmodels.oracles import Found, Table, brute_force, slow_beam_search

BOS, EOS = 2, 3
KINDS = {
    "greedy": {"max_new_tokens": 8},
    "beams": {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 8, "early_stopping": False},
    "samples": {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 8},
}
MODELS = {
    "general": make_translator(1, scale=2.0),
    "additive": make_translator(2, attention="additive", cell="gru", scale=2.0),
    "dot": make_translator(3, attention="dot", num_layers=2, scale=2.0),
    "from the first layer": make_first_looking(4, scale=2.0),
}
SOURCES = [torch.tensor([5, 9, 30, 7, 7, 12, 3]), torch.tensor([8, 3]), torch.arange(4, 40)]


def answers(model: SequenceGenerator, prefix: tuple[int, ...] = (), **fields: object) -> list[list[Hypothesis]]:
    """Of all sources at once."""
    params = SearchParams.model_validate(fields)
    return generate(model, [Request(str(i), s, params, prefix, seed=i) for i, s in enumerate(SOURCES)])


def forced(model: SequenceGenerator, source: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One whole pass over given tokens: the log-probabilities (T, V) and the attention (T, S) of each."""
    with torch.inference_mode():
        memory = model.encode(source[None], torch.tensor([len(source)]))
        passed = model.decoder.read(torch.tensor([[BOS, *tokens[:-1]]]), model.start(memory, 1), memory)
        assert passed.weights is not None
        features = model.decoder.features(passed.outputs, passed.context)
        return model.decoder.project(features)[0].log_softmax(-1), passed.weights[0]


@pytest.mark.parametrize("prefix", [(), (6, 4, 11)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_details_equal_a_whole_pass(model: SequenceGenerator, kind: str, prefix: tuple[int, ...]) -> None:
    found = answers(model, prefix, top_logprobs=7, output_attentions=True, **KINDS[kind])
    for source, hypotheses in zip(SOURCES, found, strict=True):
        for h in hypotheses:
            logprobs, weights = (table[len(prefix) :] for table in forced(model, source, h.tokens))
            assert h.attentions is not None and h.top_logprobs is not None
            assert torch.tensor(h.attentions).shape == weights.shape
            assert torch.allclose(torch.tensor(h.attentions), weights, atol=1e-5)
            assert [math.fsum(step) for step in h.attentions] == pytest.approx([1.0] * len(h.logprobs), abs=1e-5)
            values, tokens = logprobs.sort(dim=-1, descending=True)
            assert torch.allclose(
                torch.tensor([[v for _, v in step] for step in h.top_logprobs]), values[:, :7], atol=1e-4
            )
            assert [[token for token, _ in step] for step in h.top_logprobs] == tokens[:, :7].tolist()


def test_beams_of_these_tests_do_change_places() -> None:
    """Or the test above could not see a wrong way back: parents are not all the row's own."""
    engine = Engine(MODELS["general"])
    engine.submit(Request("a", SOURCES[0], SearchParams(**{**KINDS["beams"], "output_attentions": True})))
    for _ in range(6):
        engine.step()
    (lane,) = engine._lanes.values()
    assert lane.search.details is not None
    parents = lane.search.details.parents[0, :, :6].T
    assert (parents != torch.arange(5)).any(1).sum() >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_token_is_among_all_tokens(kind: str) -> None:
    """Of a vocabulary of 12, after rules, and under forced words: each logprob is found again to the last bit."""
    model = make_language_model(3, vocab_size=12, scale=2.0)
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
    force_words = ((7, 5), (9,)) if kind == "beams" else ()
    params = SearchParams.model_validate({**KINDS[kind], **rules, "top_logprobs": 20})
    (hypotheses,) = generate(model, [Request("a", None, params, bad_words=((8,),), force_words=force_words, seed=1)])
    for h in hypotheses:
        assert h.top_logprobs is not None and h.attentions is None
        for t, (token, logprob, likeliest) in enumerate(zip(h.generated, h.logprobs, h.top_logprobs, strict=True)):
            assert dict(likeliest)[token] == logprob
            assert math.fsum(math.exp(value) for _, value in likeliest) == pytest.approx(1.0, abs=1e-5)
            assert [value for _, value in likeliest] == sorted((value for _, value in likeliest), reverse=True)
            assert 8 not in dict(likeliest) and (EOS in dict(likeliest)) <= (t >= 3)


def test_equally_likely_tokens_stand_by_their_number() -> None:
    model = make_language_model(0, vocab_size=30)
    with torch.no_grad():
        assert model.decoder.output_weight is not None
        model.decoder.output_weight.zero_()
        model.decoder.output_bias.zero_()
    for count, beams in ((1, 1), (9, 3), (20, 3)):
        params = SearchParams(num_beams=beams, max_new_tokens=3, top_logprobs=count)
        ((h,),) = generate(model, [Request("a", None, params)])
        assert h.top_logprobs is not None
        assert [[token for token, _ in step] for step in h.top_logprobs] == [list(range(count))] * len(h.logprobs)


def test_company_in_a_lane_gets_its_own_number_of_alternatives() -> None:
    model = make_language_model(4, vocab_size=30)
    params = [SearchParams(max_new_tokens=length, top_logprobs=k) for length, k in ((3, 2), (9, 20), (1, 1))]
    together = generate(model, [Request(str(i), None, p) for i, p in enumerate(params)])
    for p, (h,) in zip(params, together, strict=True):
        assert h.top_logprobs is not None
        assert {len(step) for step in h.top_logprobs} == {p.top_logprobs}
    assert together[1][0].top_logprobs is not None
    assert [step[:2] for step in together[1][0].top_logprobs[:3]] == together[0][0].top_logprobs


def test_details_change_nothing_else() -> None:
    for kind in KINDS.values():
        for plain, told in zip(
            itertools.chain(*answers(MODELS["general"], **kind)),
            itertools.chain(*answers(MODELS["general"], top_logprobs=3, output_attentions=True, **kind)),
            strict=True,
        ):
            assert (plain.tokens, plain.logprobs, plain.score) == (told.tokens, told.logprobs, told.score)
            assert plain.top_logprobs is None and plain.attentions is None


def test_an_ensemble_looks_where_its_members_look_on_average() -> None:
    members = [MODELS["general"], MODELS["additive"], make_translator(4, attention="none")]
    request = Request("a", SOURCES[0], SearchParams(max_new_tokens=5, output_attentions=True))
    ((h,),) = generate(Ensemble([Stepper(member) for member in members]), [request])
    looks = [forced(member, SOURCES[0], h.tokens)[1] for member in members[:2]]
    assert torch.allclose(torch.tensor(h.attentions), (looks[0] + looks[1]) / 2, atol=1e-5)


def captioner(*channels: int) -> SequenceGenerator:
    backbone = {"image_size": [8, 8], "channels": channels}
    decoder = {"vocab_size": 10, "embedding_size": 8, "recurrent": {"hidden_size": 8}, "attention": "general"}
    encoder = {"input": "image", "backbone": backbone}
    model = make_model(architecture="generator", encoder=encoder, decoder=decoder)
    assert isinstance(model, SequenceGenerator)
    return model


def test_pictures_have_a_weight_for_each_cell() -> None:
    """And members with different grids can caption together, but cannot say where they looked."""
    picture, params = torch.randn(3, 8, 8), SearchParams(max_new_tokens=2, num_beams=2, coverage_penalty=0.5)
    params = params.model_copy(update={"output_attentions": True})
    ((h,),) = generate(captioner(4, 8), [Request("a", picture, params)])
    assert h.attentions is not None and {len(step) for step in h.attentions} == {16}
    mixed = Ensemble([Stepper(captioner(4, 8)), Stepper(captioner(4))])
    assert generate(mixed, [Request("a", picture, SearchParams(max_new_tokens=2))])
    with pytest.raises(InputError, match="output_attentions needs attention"):
        generate(mixed, [Request("a", picture, params)])


@pytest.mark.parametrize("model", [make_translator(4, attention="none"), make_language_model(1)])
def test_without_attention_there_is_nothing_to_tell(model: SequenceGenerator) -> None:
    inputs = SOURCES[0] if model.encoder else None
    for field, value in (("output_attentions", True), ("coverage_penalty", 0.5)):
        params = SearchParams.model_validate({"num_beams": 2, field: value})
        with pytest.raises(InputError, match=f"{field} needs attention, which this model has not") as error:
            Engine(model).submit(Request("a", inputs, params))
        assert error.value.param == field


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"top_logprobs": 1}])
def test_details_that_could_fill_the_memory_are_refused(asked: dict[str, Any]) -> None:
    engine = Engine(MODELS["general"])
    plain = SearchParams(max_new_tokens=50_000)
    engine.check(Request("a", SOURCES[2], plain))
    with pytest.raises(InputError, match="max_new_tokens is 50000") as error:
        engine.check(Request("a", SOURCES[2], plain.model_copy(update=asked)))
    assert error.value.param == "max_new_tokens"


# -- coverage ------------------------------------------------------------------------------------------------------


def test_the_penalty_by_hand() -> None:
    """Two requests of two hypotheses. The first has three positions, the last of which is padding to the second."""
    attended = torch.tensor([[[1.5, 0.5, 1.0], [1.0, 1.0, 1.0]], [[0.25, 1.75, 0.0], [0.0, 2.0, 0.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    penalty = Coverage(attended, mask, torch.tensor([2.0, 0.5], dtype=torch.float64)).penalty()
    assert penalty[0].tolist() == pytest.approx([2 * math.log(0.5), 0.0])
    assert float(penalty[1, 0]) == pytest.approx(0.5 * math.log(0.25))
    assert -1000 < float(penalty[1, 1]) < -40  # no attention at all: much, but a number


def test_a_search_by_hand() -> None:
    """Both hypotheses end with the second token; the likelier one has looked less at the second position."""
    params = SearchParams(num_beams=2, num_return_sequences=2, max_new_tokens=2, coverage_penalty=2.0)
    beams = Beams.begin([params], [()], BOS, torch.ones(1, 2, dtype=torch.bool))
    nats = torch.tensor([0.6, 0.4, 1e-9, 1e-9]).log()  # the two live ones write tokens 0 and 1
    beams, _ = beams.advance(nats.expand(1, 2, -1), None, EOS, weights=torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    ends = torch.tensor([1e-9, 1e-9, 1e-9, 1.0]).log()
    beams, _ = beams.advance(ends.expand(1, 2, -1), None, EOS, weights=torch.tensor([[[0.5, 0.0], [0.1, 0.5]]]))
    first, second = beams.results(0)
    # Both came from row 0 of the first step, which paid (0.5, 0.5).
    assert (first.tokens, second.tokens) == ([1, 3], [0, 3])
    assert first.score == pytest.approx(math.log(0.4) / 2 + 2 * math.log(0.5 + 0.1))
    assert second.score == pytest.approx(math.log(0.6) / 2 + 2 * math.log(0.5))


def attending_model(seed: int) -> tuple[SequenceGenerator, Tensor]:
    choose = random.Random(seed)
    kind, cell = choose.choice(["general", "dot", "additive"]), choose.choice(["lstm", "gru"])
    model = make_translator(seed, choose.choice([4, 5]), attention=kind, cell=cell, scale=choose.choice([1.5, 3.0]))
    return model, torch.tensor([choose.randrange(4) for _ in range(choose.randint(1, 6))])


def search(model: SequenceGenerator, source: Tensor, params: SearchParams) -> list[Hypothesis]:
    return generate(model, [Request("a", source, params)], max_rows=100_000)[0]


def assert_same(found: Sequence[Hypothesis], expected: Sequence[Found]) -> None:
    assert [(tuple(h.tokens), h.finish_reason) for h in found] == [(e.tokens, e.finish_reason) for e in expected]
    assert [h.score for h in found] == pytest.approx([float(e.score) for e in expected], rel=1e-4, abs=1e-4)


def test_exhaustive_width_equals_brute_force() -> None:
    changed = 0
    for seed in range(24):
        model, source = attending_model(seed)
        table = Table(model, 4, source)
        for penalty, beta in itertools.product((0.0, 1.0), (0.0, 0.3, 2.0)):
            params = SearchParams(
                num_beams=table.vocab_size**4, num_return_sequences=5, max_new_tokens=4, length_penalty=penalty,
                coverage_penalty=beta, early_stopping=False,
            )  # fmt: skip
            expected = brute_force(table, params)[:5]
            assert_same(search(model, source, params), expected)
            plain = brute_force(table, params.model_copy(update={"coverage_penalty": 0.0}))
            changed += expected[0].tokens != plain[0].tokens
    assert changed > 20  # the penalty does decide


@pytest.mark.parametrize("never_stops", [False, True])
def test_narrow_width_equals_slow_search(never_stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """never_stops: an oracle that goes on to the limit, which early_stopping=false must not be able to tell."""
    if never_stops:
        monkeypatch.setattr(oracles, "bound", lambda *_: np.inf)
    for seed in range(60):
        choose = random.Random(seed)
        model, source = attending_model(seed)
        table = Table(model, 5, source)
        for penalty, beta in itertools.product((-1.0, 0.0, 0.6, 1.0, 2.0), (0.2, 1.0)):
            width = choose.randint(2, 4)
            params = SearchParams(
                num_beams=width, num_return_sequences=choose.randint(1, width), max_new_tokens=choose.randint(4, 5),
                min_new_tokens=choose.choice([0, 0, 2]), length_penalty=penalty, coverage_penalty=beta,
                early_stopping=not never_stops and choose.random() < 0.5,
            )  # fmt: skip
            assert_same(search(model, source, params), slow_beam_search(table, params))


def test_scores_resum_from_logprobs_and_attentions() -> None:
    """Without what a forced prefix looked at, whose tokens do not count in the score either."""
    fields = {**KINDS["beams"], "coverage_penalty": 0.7, "output_attentions": True, "length_penalty": 0.6}
    for hypotheses in answers(MODELS["general"], (6, 4), **fields):
        for h in hypotheses:
            assert h.attentions is not None
            covered = [min(math.fsum(position), 1.0) for position in zip(*h.attentions, strict=True)]
            normalised = math.fsum(h.logprobs) / len(h.logprobs) ** 0.6
            assert h.score == pytest.approx(normalised + 0.7 * math.fsum(map(math.log, covered)), abs=1e-4)
