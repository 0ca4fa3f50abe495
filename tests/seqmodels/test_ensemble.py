"""Several models decoded as one."""

import random

import pytest
import torch

from seqmodels.config import Average
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.errors import ConfigError
from seqmodels.selftest import find_row_floor
from seqmodels.stepper import Ensemble, Stepper
from tests.seqmodels.builders import make_first_looking, make_language_model, make_translator
from tests.seqmodels.test_engine import random_request, run_schedule

MEMBERS = [
    make_translator(1),
    make_translator(2, attention="additive", cell="gru", hidden_size=24),
    make_translator(3, attention="none", num_layers=2, layer_norm=True, cell_zoneout=0.3),
    make_translator(4, cell="min_lstm", zoneout=0.1),
    make_first_looking(5, num_layers=2),
]


def ensemble(average: Average = "probability") -> Ensemble:
    return Ensemble([Stepper(member) for member in MEMBERS], average)


def test_of_one_model_it_is_that_model() -> None:
    requests = [
        Request("beams", torch.arange(9), SearchParams(num_beams=4, num_return_sequences=4, max_new_tokens=8)),
        Request("sample", torch.arange(5), SearchParams(do_sample=True, max_new_tokens=8), seed=3),
        # A penalty depends on the height of the logits, not only on the probabilities.
        Request("penalty", torch.arange(7), SearchParams(repetition_penalty=1.7, max_new_tokens=12)),
    ]
    for average in ("probability", "logprob"):
        twice = Ensemble([Stepper(MEMBERS[0]), Stepper(MEMBERS[0])], average)
        for one, two in zip(generate(MEMBERS[0], requests), generate(twice, requests), strict=True):
            assert [h.tokens for h in one] == [h.tokens for h in two]
            assert [h.score for h in one] == pytest.approx([h.score for h in two], abs=1e-5)


@pytest.mark.parametrize("average", ["probability", "logprob"])
def test_greedy_choice_by_teacher_forcing(average: Average) -> None:
    """Each token, and its log-probability, from the members' whole forward passes over what came before it."""
    source = torch.tensor([[5, 9, 30, 7, 7, 12]] * 4)
    request = Request("one", source[0], SearchParams(max_new_tokens=10, min_new_tokens=10))
    (found,) = generate(ensemble(average), [request])[0]
    with torch.inference_mode():
        lengths = torch.full((4,), 6)
        memories = [member.encode(source, lengths) for member in MEMBERS]
        for t, token in enumerate(found.tokens):
            so_far = torch.tensor([[2, *found.tokens[:t]]] * 4)
            logits = torch.stack([
                member.decoder(so_far, member.start(memory, 4), memory)[0][0, -1]
                for member, memory in zip(MEMBERS, memories, strict=True)
            ])  # fmt: skip
            mean = logits.softmax(-1).mean(0).log() if average == "probability" else logits.log_softmax(-1).mean(0)
            mean[3] = -torch.inf if t < 9 else mean[3]  # min_new_tokens bans EOS
            assert int(mean.argmax()) == token
            assert float(mean.log_softmax(-1)[token]) == pytest.approx(found.logprobs[t], abs=1e-5)


def test_a_busy_engine_changes_no_bit() -> None:
    model = ensemble()
    floor = find_row_floor(MEMBERS[0], model)
    if floor is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    choose = random.Random(0)
    bank = [random_request(choose, str(i), model) for i in range(40)]
    expected = [generate(model, [request], row_floor=floor)[0] for request in bank]
    for _ in range(60):
        run_schedule(choose, model, floor, bank, expected)  # type: ignore[arg-type]


def test_members_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="write 40 and 30 tokens"):
        Ensemble([Stepper(MEMBERS[0]), Stepper(make_translator(0, vocab_size=30))])
    with pytest.raises(ConfigError, match="read text and nothing"):
        Ensemble([Stepper(MEMBERS[0]), Stepper(make_language_model(0, vocab_size=40))])


@pytest.mark.parametrize("average", ["probability", "logprob"])
def test_many_members_answer_alike_in_any_company(average: Average) -> None:
    members = [make_translator(seed=seed) for seed in range(6)]
    if find_row_floor(members[0]) is None:
        pytest.skip("on this machine these shapes are not batch invariant; /readyz would say so")
    assert find_row_floor(members, Ensemble([Stepper(member) for member in members], average), average) is not None
