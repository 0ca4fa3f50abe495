"""Self-critical training: its gradient against all texts written out, rewards by hand, and that it does its work."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from seqmodels.errors import ConfigError
from seqmodels.models import SequenceGenerator
from seqmodels.pretrained import load_pretrained
from seqmodels.tokenizer import BOS, EOS, PAD, Tokenizer
from tests.seqmodels.builders import make_translator
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TRANSLATOR, WORDS, fields, recipe
from training import captions, self_critical
from training.data import generated
from training.data.rows import Row
from training.parsing import parse_recipe
from training.run import train
from training.self_critical import REWARDS, CiderReward, Reward, SelfCritical, Written

STEPS = 2  # the longest text of the enumeration
SOURCE = torch.tensor([[4, 5, EOS]])
TARGET = torch.tensor([[BOS, 4, 5, EOS]])


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a b"], "word", 6)


def planted(text: str, references: Sequence[str]) -> float:
    assert list(references) == ["a b"]
    return {"a": 0.9, "b a": 0.6, "b": 0.3, "": 0.1}.get(text, 0.0)


def a_model() -> SequenceGenerator:
    return make_translator(seed=3, vocab_size=6, hidden_size=8, embedding_size=4)


def every_text() -> list[list[int]]:
    """All token sequences that can be written: to the first EOS, or to the limit."""
    words = [token for token in range(6) if token != EOS]
    ended = [[*start, EOS] for length in range(STEPS) for start in itertools.product(words, repeat=length)]
    return ended + [list(tokens) for tokens in itertools.product(words, repeat=STEPS)]


def gradients(model: SequenceGenerator, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def batch_of(rows: int) -> dict[str, Tensor]:
    return {
        "labels": TARGET.repeat(rows, 1),
        "label_lengths": torch.full((rows,), 4),
        "inputs": SOURCE.repeat(rows, 1),
        "lengths": torch.full((rows,), 3),
    }


def with_dropout(rate: float) -> SequenceGenerator:
    """In training, with the weights of `a_model`."""
    whole = a_model()
    assert whole.config.decoder is not None
    decoder = whole.config.decoder.model_copy(update={"dropout": rate, "scheduled_sampling": rate})
    model = SequenceGenerator(whole.config.model_copy(update={"decoder": decoder}))
    model.load_state_dict(whole.state_dict())
    return model.train()


def test_its_gradient_is_on_average_that_of_the_expected_reward(tokenizer: Tokenizer) -> None:
    model = a_model()
    texts = every_text()
    labels = torch.tensor([[BOS, *tokens, *[PAD] * (STEPS - len(tokens))] for tokens in texts])
    lengths = torch.tensor([1 + len(tokens) for tokens in texts])
    rows = len(texts)
    probabilities = model.logprobs(labels, lengths, SOURCE.repeat(rows, 1), torch.full((rows,), 3)).sum(1).exp()
    assert float(probabilities.detach().sum()) == pytest.approx(1.0, abs=1e-5)
    rewards = torch.tensor([planted(tokenizer.decode(tokens), ["a b"]) for tokens in texts])
    exact = gradients(model, -(probabilities * rewards).sum())

    torch.manual_seed(0)
    drawn = 60_000
    out = SelfCritical(model, tokenizer, planted, 1.0, STEPS)(**batch_of(drawn))
    assert out.num_targets == 3 * drawn
    found = gradients(model, out.loss * out.num_targets / drawn)
    assert float((found - exact).norm() / exact.norm()) < 0.03


def test_what_is_as_good_as_all_else_teaches_nothing_with_dropout_either(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every drawn text is worth 1 and every greedy one 0, all texts should become likelier, which they cannot.
    With dropout in what is learned from, but not in what is drawn, this gradient was as long as the usual one."""
    model, drawn = with_dropout(0.7), 60_000
    rewards = itertools.cycle([[1.0] * drawn, [0.0] * drawn])
    monkeypatch.setattr(SelfCritical, "_rewards", lambda *_: next(rewards))
    torch.manual_seed(0)
    out = SelfCritical(model, tokenizer, planted, 1.0, STEPS)(**batch_of(drawn))
    found = float(gradients(model, out.loss * out.num_targets / drawn).norm())
    usual = float(gradients(model, model(**batch_of(drawn)).loss).norm())
    assert found / usual < 0.02, found / usual


def choose(monkeypatch: pytest.MonkeyPatch, name: str, labels: Tensor) -> None:
    """In place of what chooses: the tokens of these labels, in their order."""
    steps = iter(labels[:, 1:].unbind(1))
    monkeypatch.setattr(self_critical, name, lambda _: next(steps))


def test_the_greedy_text_is_the_baseline_and_the_loss_is_mixed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows, one better than its greedy text and one worse, worked out with `logprobs`."""
    model = a_model()
    drawn = torch.tensor([[BOS, 4, EOS], [BOS, 5, 5]]), torch.tensor([3, 3])
    choose(monkeypatch, "_draw", drawn[0])
    choose(monkeypatch, "_likeliest", torch.tensor([[BOS, EOS, PAD], [BOS, 5, EOS]]))
    batch = batch_of(2)
    out = SelfCritical(model, tokenizer, planted, 0.75, STEPS)(**batch)
    logprobs = model.logprobs(*drawn, batch["inputs"], batch["lengths"]).sum(1)
    cost = -((0.9 - 0.1) * logprobs[0] + (0.0 - 0.3) * logprobs[1]) / 6
    plain = model(**batch)
    assert float(out.loss.detach()) == pytest.approx(float((0.25 * plain.loss + 0.75 * cost).detach()), rel=1e-5)
    assert torch.equal(out.nll, plain.nll) and out.num_targets == plain.num_targets == 6


def test_a_batch_costs_what_its_rows_cost(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that micro-batches of any size add up to one update."""
    model, batch = a_model(), batch_of(3)
    batch["label_lengths"] = torch.tensor([4, 2, 3])
    labels = torch.tensor([[BOS, 4, EOS], [BOS, 5, 4], [BOS, EOS, PAD]])
    critical = SelfCritical(model, tokenizer, lambda text, _: len(text) / 7, 0.5, STEPS)

    def total(*chosen: int) -> Tensor:
        rows = list(chosen)
        choose(monkeypatch, "_draw", labels[rows])
        choose(monkeypatch, "_likeliest", labels[[0] * len(rows)])
        out = critical(**{name: value[rows] for name, value in batch.items()})
        return out.loss * out.num_targets

    assert torch.allclose(total(0, 1, 2), total(0) + total(1, 2), rtol=1e-5)


def test_what_it_writes_is_drawn_from_the_model_and_greedy_without_dropout(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Written] = []
    write = SelfCritical._write
    monkeypatch.setattr(
        SelfCritical, "_write", lambda *given, **more: written.append(write(*given, **more)) or written[-1]
    )
    rows = 4000
    torch.manual_seed(1)
    for rate in (0.0, 0.9):
        model = with_dropout(rate)
        SelfCritical(model, tokenizer, planted, 1.0, 5)(**batch_of(rows))
        assert model.training
    drawn, _, _, greedy = written
    model.eval()
    step = model.predict(torch.tensor([[BOS, BOS]]), SOURCE, torch.tensor([3]))[0, 0].exp()
    shares = drawn.labels[:, 1].bincount(minlength=6) / rows
    assert torch.allclose(shares, step.detach(), atol=0.03)
    tokens = [BOS]
    while len(tokens) < 6 and tokens[-1] != EOS:
        tokens.append(int(model.predict(torch.tensor([[*tokens, PAD]]), SOURCE, torch.tensor([3]))[0, -1].argmax()))
    assert greedy.labels[:, : len(tokens)].tolist() == [tokens] * rows and (greedy.counts == len(tokens)).all()
    for labels, length in zip(drawn.labels[:200].tolist(), drawn.counts[:200].tolist(), strict=True):
        tokens = labels[1:length]
        assert EOS not in tokens[:-1] and labels[length:] == [PAD] * (len(labels) - length)
        assert tokens[-1] == EOS or length == 6


def test_what_is_in_evaluation_stays_there(tokenizer: Tokenizer) -> None:
    """As batch normalisation that is frozen."""
    model = a_model().train()
    assert model.encoder is not None
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    SelfCritical(model, tokenizer, planted, 0.5, STEPS)(**batch_of(2))
    assert [module.training for module in model.modules()] == before and {*before} == {True, False}


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("exact_match", ("the cat sat", "the cat sat "), 1.0),
        ("exact_match", ("the cat", "the cat sat"), 0.0),
        # 2 of 2 words and 1 of 1 pair are right, and e^(1 - 3/2) is taken off for brevity.
        ("bleu", ("the cat", "the cat sat"), 0.6065306597),
        ("bleu", ("", "the cat sat"), 0.0),
        ("chrf", ("the cat sat", "the cat sat"), 1.0),
    ],
)
def test_rewards_by_hand(name: str, texts: tuple[str, str], expected: float) -> None:
    text, reference = texts
    assert REWARDS[name](text, [reference]) == pytest.approx(expected)
    assert REWARDS[name](text, ["nothing like it", reference]) == pytest.approx(expected)


def test_rewards_are_sacrebleus() -> None:
    text, reference = "vingt et un mille cent", "vingt et un mille deux cents"
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):
        assert REWARDS[name](text, [reference]) == metric.sentence_score(text, [reference]).score / 100
        assert 0 < REWARDS[name](text, [reference]) < 1


def test_the_reward_of_a_caption_is_cider_d_of_all_its_references() -> None:
    """By the training split's weights, a hundredth of what is reported, of texts that end with a token of their own."""
    train = [["a dog runs", "the dog is running"], ["a cat", "one cat"], ["two men", "people"]]
    reward = CiderReward([Row(bytes([n]), tuple(texts)) for n, texts in enumerate(train)])
    corpus = [[[*text.split(), "<eos>"] for text in texts] for texts in train]
    assert reward("A dog runs .", train[0]) == pytest.approx(captions.Cider(corpus).score(corpus[0][0], corpus[0]))
    assert reward("a dog runs", train[0]) > reward("a dog runs", train[0][1:]) > reward("a cat", train[0][1:]) == 0.0
    mean = sum(reward(texts[0], texts) for texts in train) / 3
    assert mean == pytest.approx(captions.cider_d([texts[0] for texts in corpus], corpus) / 100)


def test_a_caption_that_breaks_off_is_worth_less() -> None:
    """Than by the measure that is reported, which cannot see it."""
    corpus = [["a man with a hat", "a man with a dog"], ["two men", "people"], ["with a ball"]]
    reward = CiderReward([Row(bytes([n]), tuple(texts)) for n, texts in enumerate(corpus)])
    plain = captions.Cider([[text.split() for text in texts] for texts in corpus])
    whole, cut = "a man with a hat", "a man with a"
    measured = [plain.score(text.split(), [one.split() for one in corpus[0]]) for text in (whole, cut)]
    assert reward(cut, corpus[0]) / reward(whole, corpus[0]) < 0.9 * measured[1] / measured[0]


def test_a_row_is_rewarded_by_its_own_references(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Sequence[str]]] = []
    for name in ("_draw", "_likeliest"):
        choose(monkeypatch, name, torch.tensor([[BOS, 4, EOS], [BOS, 5, EOS]]))
    critical = SelfCritical(a_model(), tokenizer, lambda *given: float(not seen.append(given)), 0.5, STEPS)
    critical(**batch_of(2), references=[("b", "a"), ()])
    words = tokenizer.decode([4]), tokenizer.decode([5])
    assert seen == 2 * [(words[0], ("b", "a")), (words[1], ["a b"])]


# -- runs

PAIRS = {"generated": "numbers-en-fr", "tokenizer": WORDS}
GENERATION = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator that has not learned enough."""
    directory = tmp_path_factory.mktemp("begun") / "model"
    run = {"max_steps": 250, "rows_per_batch": 32, "max_eval_samples": 100, "eval_steps": 250}
    made = {"data": PAIRS, "model": TRANSLATOR, "generation": GENERATION, "optim": {"learning_rate": 0.02}}
    return train(recipe("translate", directory, run=run, **made))


def critical(begun: Path, directory: Path, **run: Any) -> dict[str, Any]:
    data = {"generated": "numbers-en-fr"}
    run = {"self_critical": "chrf", "rows_per_batch": 32, "max_eval_samples": 100, **run}
    return fields(
        "translate", directory, data=data, model={"init_from": str(begun)}, generation=GENERATION,
        optim={"learning_rate": 2e-3}, run=run,
    )  # fmt: skip


def validated(directory: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((directory / "finished.json").read_text())["validation"]
    return scores


def test_it_raises_the_metric_more_than_the_usual_loss_does(begun: Path, tmp_path: Path) -> None:
    for name, reward in (("rewarded", "chrf"), ("usual", None)):
        train(parse_recipe(critical(begun, tmp_path / name, max_steps=60, self_critical=reward)))
    before, after, usual = (validated(path)["chrf"] for path in (begun, tmp_path / "rewarded", tmp_path / "usual"))
    assert after > before + 5 and after > usual + 1, (before, after, usual)
    lines = [json.loads(line) for line in (tmp_path / "rewarded" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "validation" in line)
    assert first["step"] == 0 and first["validation"]["chrf"] == pytest.approx(before), "what it began with may be best"


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=["plain", "bf16"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    begun: Path, tmp_path: Path, train_until: TrainUntil, settings: dict[str, Any]
) -> None:
    run = {"max_steps": 8, "save_steps": 3, "logging_steps": 2, "rows_per_batch": 8, "max_eval_samples": 4, **settings}
    train(parse_recipe(critical(begun, tmp_path / "whole", **run)))
    for step in (2, 5, 7):
        train_until(parse_recipe(critical(begun, tmp_path / "stopped", **run)), step)
    train(parse_recipe(critical(begun, tmp_path / "stopped", **run)))
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    assert load_pretrained(tmp_path / "whole").revision == load_pretrained(tmp_path / "stopped").revision


def test_captions_are_learned_from_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generated.SIZES, "captions", (24, 4, 4))
    encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [2, 4]}}
    model = {"architecture": "generator", "encoder": encoder, "decoder": LANGUAGE_MODEL["decoder"]}
    data = {"generated": "captions", "tokenizer": WORDS}
    first = train(recipe("caption", tmp_path / "first", data=data, model=model, generation=GENERATION))
    made = {"data": {"generated": "captions"}, "model": {"init_from": str(first)}, "generation": GENERATION}
    second = train(recipe("caption", tmp_path / "second", **made, run={"self_critical": "bleu"}))
    plain = train(recipe("caption", tmp_path / "plain", **made))
    revisions = {load_pretrained(directory).revision for directory in (first, second, plain)}
    assert len(revisions) == 3, "it learns, and other things than it would from the texts alone"
    by_cider = train(recipe("caption", tmp_path / "by cider", **made, run={"self_critical": "cider_d"}))
    assert load_pretrained(by_cider).revision not in revisions


@pytest.mark.parametrize(
    ("task", "sections", "words"),
    [
        ("classify", {"run": {"self_critical": "chrf"}, "model": CLASSIFIER}, "run.self_critical is 'chrf'.*classify"),
        (
            "generate",
            {"run": {"self_critical": "bleu"}, "model": LANGUAGE_MODEL, "data": {"generated": "language-model"}},
            "run.self_critical is 'bleu'.*generate writes no text for an input",
        ),
        (
            "translate",
            {"run": {"self_critical": "bleu"}, "model": TRANSLATOR, "data": PAIRS},
            r"run.self_critical is 'bleu'.*model\.init_from",
        ),
        (
            "translate",
            {"run": {"self_critical_weight": 0.5}, "model": TRANSLATOR, "data": PAIRS},
            "run.self_critical_weight does nothing without run.self_critical",
        ),
        (
            "translate",
            {"run": {"self_critical": "ter"}, "model": TRANSLATOR, "data": PAIRS},
            "run.self_critical.*'ter'",
        ),
        (
            "translate",
            {"run": {"self_critical": "cider_d"}, "model": TRANSLATOR, "data": PAIRS},
            "run.self_critical is 'cider_d', which is of captions",
        ),
    ],
)
def test_where_it_cannot_act_it_is_refused(task: str, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_recipe(fields(task, **sections))


def test_rewards_are_called_once_for_each_text(tokenizer: Tokenizer) -> None:
    calls: list[tuple[str, Sequence[str]]] = []

    def counted(text: str, references: Sequence[str]) -> float:
        calls.append((text, references))
        return 0.0

    reward: Reward = counted
    SelfCritical(a_model(), tokenizer, reward, 0.5, STEPS)(**batch_of(5)).loss.backward()
    assert len(calls) == 10 and all(references == ["a b"] for _, references in calls)
