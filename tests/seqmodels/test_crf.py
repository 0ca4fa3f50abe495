"""The chain over labels: sums over all sequences, counted one by one."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.config import ModelConfig
from seqmodels.crf import LinearChain
from seqmodels.ensemble import Averaged
from seqmodels.errors import ConfigError, UnsupportedError
from seqmodels.forward import Forward, ForwardRequest
from seqmodels.losses import IGNORE
from seqmodels.models import SequenceTagger
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import save_pretrained
from seqmodels.selftest import find_row_floor
from seqmodels.state import State
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model

# Rows of five positions: all labelled; padded; with gaps, as words of several pieces leave; none labelled at all.
LABELLED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
ENCODER: dict[str, Any] = {
    "input": "text", "vocab_size": 12, "embedding_size": 8, "recurrent": {"hidden_size": 8, "bidirectional": True},
}  # fmt: skip


def make_chain(num_labels: int = 3) -> LinearChain:
    chain = LinearChain(num_labels)
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    return chain


def make_tagger(seed: int = 0, scale: float = 3.0, **fields: Any) -> SequenceTagger:
    model = make_model(seed, scale, architecture="tagger", encoder=ENCODER, labels=["a", "b", "c"], crf=True, **fields)
    assert isinstance(model, SequenceTagger) and model.crf is not None
    torch.nn.init.normal_(model.crf.transitions, generator=torch.Generator().manual_seed(seed))
    return model


def sequences(chain: LinearChain, scores: Tensor) -> dict[tuple[int, ...], float]:
    """The score of every sequence of labels of scores (T, C), from the words of the module."""
    found = {}
    for labels in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        total = float(chain.start[labels[0]]) + float(chain.end[labels[-1]])
        total += sum(float(scores[t, label]) for t, label in enumerate(labels))
        total += sum(float(chain.transitions[pair]) for pair in itertools.pairwise(labels))
        found[labels] = total
    return found


@torch.no_grad()
def test_costs_and_probabilities_are_those_of_all_sequences() -> None:
    chain, scores = make_chain(), torch.randn(5, 5, 3)
    labels = torch.randint(0, 3, (5, 5)).masked_fill(~LABELLED, IGNORE)
    costs, logprobs = chain(scores, labels, LABELLED)
    assert torch.equal(logprobs, chain.logprobs(scores, LABELLED))
    for row in range(4):
        places = LABELLED[row].nonzero()[:, 0]
        weights = {y: math.exp(score) for y, score in sequences(chain, scores[row, places]).items()}
        total = sum(weights.values())
        chance = weights[tuple(labels[row, places].tolist())] / total
        assert float(costs[row]) == pytest.approx(-math.log(chance), rel=1e-4)
        for t, place in enumerate(places.tolist()):
            for label in range(3):
                share = sum(weight for y, weight in weights.items() if y[t] == label) / total
                assert float(logprobs[row, place, label].exp()) == pytest.approx(share, abs=1e-5)
    assert float(costs[4]) == 0.0 and bool(logprobs.isfinite().all())


def test_gradients_are_probabilities_less_what_is_right() -> None:
    """What is known of the exponential family, by another way than sums over sequences; and padding has none."""
    chain, scores = make_chain(), torch.randn(5, 5, 3, requires_grad=True)
    labels = torch.randint(0, 3, (5, 5)).masked_fill(~LABELLED, IGNORE)
    chain(scores, labels, LABELLED)[0].sum().backward()
    right = F.one_hot(labels.clamp(min=0), 3)
    wanted = (chain.logprobs(scores, LABELLED).exp() - right) * LABELLED[:, :, None]
    assert scores.grad is not None and torch.allclose(scores.grad, wanted, atol=1e-5)
    for parameter in chain.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


def test_a_chain_that_knows_nothing_is_a_softmax_at_each_position() -> None:
    scores = torch.randn(5, 5, 3)
    labels = torch.randint(0, 3, (5, 5)).masked_fill(~LABELLED, IGNORE)
    chain = LinearChain(3)
    assert torch.allclose(chain.logprobs(scores, LABELLED)[LABELLED], scores.log_softmax(-1)[LABELLED], atol=1e-6)
    each = F.cross_entropy(scores[LABELLED], labels[LABELLED], reduction="sum")
    assert torch.allclose(chain(scores, labels, LABELLED)[0].sum(), each, atol=1e-5)


def test_long_rows_and_large_scores_stay_finite() -> None:
    chain, scores = make_chain(4), 1e4 * torch.randn(2, 800, 4)
    labelled = torch.ones(2, 800, dtype=torch.bool)
    assert bool(chain.logprobs(scores, labelled).isfinite().all())
    assert bool(chain(scores, torch.zeros(2, 800, dtype=torch.int64), labelled)[0].isfinite().all())


def test_loss_of_a_tagger_is_the_mean_per_label() -> None:
    model = make_tagger()
    tokens, lengths = torch.randint(0, 12, (3, 6)), torch.tensor([6, 4, 2])
    labels = torch.randint(0, 3, (3, 6)).masked_fill(torch.arange(6) >= lengths[:, None], IGNORE)
    out = model(tokens, labels, lengths)
    alone = [
        model(tokens[row : row + 1, :n], labels[row : row + 1, :n], lengths[row : row + 1])
        for row, n in enumerate(lengths.tolist())
    ]
    assert int(out.num_targets) == 12
    for name in ("loss", "nll"):
        total = sum(float(getattr(one, name).detach()) * int(one.num_targets) for one in alone)
        assert float(getattr(out, name).detach()) == pytest.approx(total / 12, rel=1e-5)
    logprobs, targets, _ = model.target_logits(tokens, labels, lengths)
    assert torch.allclose(out.nll, F.nll_loss(logprobs.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
    nothing = model(tokens, torch.full_like(labels, IGNORE), lengths)
    assert float(nothing.loss.detach()) == 0.0 and int(nothing.num_targets) == 0


def test_the_loss_ignores_what_stands_at_other_positions() -> None:
    model = make_tagger()
    tokens, lengths = torch.randint(0, 12, (2, 6)), torch.tensor([6, 3])
    labels = torch.tensor([[0, IGNORE, 1, 2, IGNORE, 1], [2, 1, IGNORE, IGNORE, IGNORE, IGNORE]])
    other = tokens.clone()
    other[1, 3:] = 5
    assert torch.equal(model(tokens, labels, lengths).loss, model(other, labels, lengths).loss)


def test_it_learns_what_each_position_alone_cannot_tell() -> None:
    """Inputs say nothing but how long a row is: a, b, a ... or b, a, b ..., as likely. Neighbours never agree."""
    model = make_tagger(scale=1.0).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    tokens = torch.full((16, 6), 5)
    labels = (torch.arange(6) + torch.arange(16)[:, None]) % 2
    for _ in range(100):
        optimizer.zero_grad()
        out = model(tokens, labels, torch.full((16,), 6))
        out.loss.backward()
        optimizer.step()
    assert float(out.loss.detach()) == pytest.approx(math.log(2) / 6, abs=0.02)  # one choice a row
    assert float(out.nll) == pytest.approx(math.log(2), abs=0.05)  # of each label, whatever the others are


@torch.inference_mode()
@pytest.mark.parametrize("num_labels", [2, 3, 5, 23])
def test_answers_do_not_depend_on_company(num_labels: int) -> None:
    labels = [f"label {i}" for i in range(num_labels)]
    model = make_model(0, 2.0, architecture="tagger", encoder=ENCODER, labels=labels, crf=True)
    floor = find_row_floor(model)
    if floor is None:
        pytest.skip("this machine's kernels give no floor")
    requests = [
        ForwardRequest(str(n), torch.randint(0, 12, (n,)), positions=tuple(range(n))[n % 2 :: 2] or (0,))
        for n in (1, 2, 5, 7, 11, 12, 13, 30)
    ]
    together = answers(Forward(model, row_floor=floor), requests)
    for request in requests:
        assert torch.equal(answers(Forward(model, row_floor=floor), [request])[request.id], together[request.id])


@torch.inference_mode()
def test_requests_with_and_without_positions_share_a_batch() -> None:
    model = make_tagger()
    one, two = (torch.randint(0, 12, (n,)) for n in (7, 5))
    requests = [ForwardRequest("all", one), ForwardRequest("some", two, positions=(1, 3))]
    alone = {request.id: answers(Forward(model), [request])[request.id] for request in requests}
    everywhere = model.predict(one[None], torch.tensor([7]))[0].exp()[0]
    assert torch.allclose(alone["all"], everywhere, atol=1e-5)
    for order in (requests, requests[::-1]):
        together = answers(Forward(model), order)
        assert all(torch.allclose(together[name], alone[name], atol=1e-6) for name in alone)


def test_an_input_in_pieces_is_refused() -> None:
    model = make_tagger()
    with pytest.raises(UnsupportedError, match="as a whole"):
        model.predict(torch.randint(0, 12, (4, 3)), torch.full((4,), 3), State(torch.zeros(4, 8)))


@torch.inference_mode()
def test_a_forward_pass_asks_at_the_positions_of_each_request() -> None:
    model = make_tagger()
    tokens = torch.randint(0, 12, (7,))
    found = answers(Forward(model), [ForwardRequest("one", tokens, positions=(1, 4, 6))])["one"]
    labelled = torch.zeros(1, 7, dtype=torch.bool)
    labelled[0, [1, 4, 6]] = True
    wanted = model.predict(tokens[None], torch.tensor([7]), labelled=labelled)[0].exp()[0]
    assert torch.allclose(found[[1, 4, 6]], wanted[[1, 4, 6]], atol=1e-5)
    everywhere = model.predict(tokens[None], torch.tensor([7]))[0].exp()[0]
    assert not torch.allclose(found[[1, 4, 6]], everywhere[[1, 4, 6]], atol=1e-3)


def test_a_text_is_labelled_as_its_last_pieces_are_trained(tmp_path: Path) -> None:
    """From text to tags: words of several pieces, each labelled once, alone and in company."""
    tokenizer = Tokenizer.train(["the quick brown fox", "jumps over the lazy dog"], "bpe", vocab_size=270)
    encoder = {**ENCODER, "vocab_size": tokenizer.vocab_size}
    model = make_model(0, 2.0, architecture="tagger", encoder=encoder, labels=["a", "b", "c"], crf=True)
    save_pretrained(model, tmp_path, source_tokenizer=tokenizer)
    pipeline = Pipeline.from_pretrained(tmp_path)
    texts = ["the brown jumper", "fox", "over and over the lazy dogs in the evening"]
    answers = pipeline(texts)
    assert not pipeline.batch_invariant or [pipeline([text])[0] for text in texts] == answers
    for text, answer in zip(texts, answers, strict=True):
        ids, last = tokenizer.encode_words(text.split())
        assert len(ids) > len(last)
        labelled = torch.zeros(1, len(ids), dtype=torch.bool)
        labelled[0, last] = True
        with torch.no_grad():
            logprobs, _ = model.predict(torch.tensor([ids]), torch.tensor([len(ids)]), labelled=labelled)  # type: ignore[call-arg]
        chances, best = logprobs[0, last].exp().max(-1)
        assert [tag["label"] for tag in answer["tags"]] == ["abc"[i] for i in best.tolist()]
        assert [tag["score"] for tag in answer["tags"]] == pytest.approx(chances.tolist(), abs=1e-5)


@torch.inference_mode()
def test_members_of_an_ensemble_average_probabilities() -> None:
    one, two = make_tagger(1), make_tagger(2)
    tokens, lengths = torch.randint(0, 12, (2, 6)), torch.tensor([6, 4])
    labels = torch.randint(0, 3, (2, 6)).masked_fill(torch.arange(6) >= lengths[:, None], IGNORE)
    mean = (
        one.target_logits(tokens, labels, lengths)[0].exp() + two.target_logits(tokens, labels, lengths)[0].exp()
    ) / 2
    out = Averaged([one, two], "probability")(inputs=tokens, labels=labels, lengths=lengths)
    wanted = F.nll_loss(mean.log().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert float(out.nll) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architecture": "classifier"}, "crf is for taggers"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"class_weights": {"a": 2.0}}, "class_weights"),
        ({"architecture": "generator", "labels": [], "decoder": {"vocab_size": 9}}, "has no `crf`"),
    ],
)
def test_what_contradicts_is_refused(fields: dict[str, Any], named: str) -> None:
    whole = {"architecture": "tagger", "labels": ["a", "b"], "encoder": ENCODER, "crf": True, **fields}
    with pytest.raises(ConfigError, match=named):
        ModelConfig.parse(whole)


def answers(worker: Forward, requests: list[ForwardRequest]) -> dict[str, Tensor]:
    for request in requests:
        worker.submit(request)
    found: dict[str, Tensor] = {}
    while worker.has_work:
        for event in worker.step():
            found[event.request_id] = event.result.values  # type: ignore[union-attr]
    return found
