"""Dynamic evaluation and the cache: against the papers' equations written out word by word."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqmodels.models import SequenceGenerator
from tests.seqmodels.builders import make_language_model
from tests.training.recipes import LANGUAGE_MODEL, WORDS, recipe
from training.__main__ import main
from training.adaptive import EPSILON, Adaptation, Adaptive
from training.data.examples import Example
from training.run import train

VOCABULARY, SEGMENT = 9, 5
TEXT = [2, *torch.randint(4, VOCABULARY, (23,), generator=torch.Generator().manual_seed(1)).tolist()]
TRAIN = [Example(None, [2, *([4, 5, 6, 7, 8] * 240)], 0, 1201)]


def model() -> SequenceGenerator:
    return make_language_model(seed=3, vocab_size=VOCABULARY, cell="gru", tie_embeddings=True)


def scored(adaptation: Adaptation, text: list[int] = TEXT, train: Any = TRAIN) -> list[float]:
    """The mean nll of each segment of a text."""
    adaptive, state, nlls = Adaptive(model(), adaptation, train), None, []
    for first in range(0, len(text) - 1, SEGMENT):
        labels = torch.tensor([text[first : first + SEGMENT + 1]])
        out = adaptive(labels, torch.tensor([labels.shape[1]]), state=state)
        assert out.num_targets == labels.shape[1] - 1 and out.state is not None
        state, nlls = out.state, [*nlls, float(out.nll)]
    return nlls


def plain(text: list[int] = TEXT) -> Tensor:
    """Log-probabilities of each word."""
    labels = torch.tensor([text])
    return model().logprobs(labels, torch.tensor([len(text)]))[0].detach()


def segments(values: Tensor) -> list[float]:
    return [-float(values[first : first + SEGMENT].mean()) for first in range(0, len(values), SEGMENT)]


def test_without_a_step_it_is_the_model_itself() -> None:
    assert scored(Adaptation(dynamic_rate=1e-12)) == pytest.approx(segments(plain()), abs=1e-5)


@pytest.mark.parametrize("decay", [0.05, 0.9])  # the second draws some weights back all the way
def test_dynamic_evaluation_is_that_of_the_paper(decay: float) -> None:
    rate = 0.01
    one = model()
    names = [name for name, _ in one.named_parameters()]
    # Usual sizes of gradients, from 100 rows of the training text side by side, as `Streams` lays them, in three
    # segments of which each goes on where the last one ended.
    found = {name: torch.zeros_like(value) for name, value in one.named_parameters()}
    words = torch.tensor(TRAIN[0].targets[1:]).view(100, 12)
    table, state = torch.cat([torch.full((100, 1), 2), words], 1), None
    for start, end in ((0, 5), (5, 10), (10, 12)):
        one.zero_grad()
        logits, targets, state = one.target_logits(
            table[:, start : end + 1], torch.full((100,), end - start + 1), state=state
        )
        F.cross_entropy(logits, targets).backward()
        assert state is not None
        state = state.detach()
        for name, value in one.named_parameters():
            assert value.grad is not None
            found[name] += value.grad**2
    sizes = {name: (square / 3).sqrt() for name, square in found.items()}
    mean = torch.cat([size.flatten() for size in sizes.values()]).mean()
    beyond = [bool((decay * size / mean > 1.0).any()) for size in sizes.values()]
    assert any(beyond) == (decay == 0.9)
    first = {name: value.detach().clone() for name, value in one.named_parameters()}
    nlls, state = [], None
    for start in range(0, len(TEXT) - 1, SEGMENT):
        labels = torch.tensor([TEXT[start : start + SEGMENT + 1]])
        one.zero_grad()
        logits, targets, state = one.target_logits(labels, torch.tensor([labels.shape[1]]), state=state)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        nlls.append(loss.item())
        assert state is not None
        state = state.detach()
        with torch.no_grad():
            for name in names:
                value = one.get_parameter(name)
                back = torch.clamp(decay * sizes[name] / mean, max=1.0) * (first[name] - value)
                assert value.grad is not None
                value += back - rate * value.grad / (sizes[name] + EPSILON)
    adapted = scored(Adaptation(dynamic_rate=rate, dynamic_decay=decay))
    assert adapted == pytest.approx(nlls, abs=1e-4)
    assert adapted[0] == pytest.approx(segments(plain())[0], abs=1e-5), "the first words are scored before any step"
    assert adapted[1:] != pytest.approx(segments(plain())[1:], abs=1e-3)


def test_what_is_learned_from_comes_later_than_what_is_scored() -> None:
    adaptation = Adaptation(dynamic_rate=0.01, cache_weight=0.3)
    changed = [*TEXT[:-3], *(4 + (word - 3) % 5 for word in TEXT[-3:])]
    assert scored(adaptation, changed)[:4] == scored(adaptation)[:4]
    assert scored(adaptation, changed)[4] != scored(adaptation)[4]


@pytest.mark.parametrize("size", [3, 500])
def test_the_cache_is_that_of_the_paper(size: int) -> None:
    weight, flatness = 0.25, 0.7
    one, labels = model(), torch.tensor([TEXT])
    states = one.decoder.read(labels[:, :-1], one.start(None, 1))[0][0].detach()
    logprobs = plain()
    mixed = []
    for t, word in enumerate(TEXT[1:]):
        seen = range(max(0, t - size), t)
        likeness = {i: math.exp(flatness * float(states[t] @ states[i])) for i in seen}
        chance = math.exp(float(logprobs[t]))
        if likeness:
            cached = sum(x for i, x in likeness.items() if TEXT[i + 1] == word) / sum(likeness.values())
            chance = (1 - weight) * chance + weight * cached
        mixed.append(math.log(chance))
    adaptation = Adaptation(cache_weight=weight, cache_flatness=flatness, cache_size=size)
    assert scored(adaptation, train=()) == pytest.approx(segments(torch.tensor(mixed)), abs=1e-5)


def test_a_text_that_repeats_itself_grows_likelier() -> None:
    again = [2, *([4, 7, 5, 5, 8, 6, 4] * 20)]
    alone = sum(segments(plain(again)))
    assert sum(scored(Adaptation(dynamic_rate=0.01), again)) < 0.8 * alone
    assert sum(scored(Adaptation(cache_weight=0.5, cache_flatness=3.0), again)) < 0.8 * alone


def test_the_command_scores_with_both_and_leaves_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"generated": "language-model", "tokenizer": WORDS, "chunk_length": 16}
    run = {"max_steps": 30, "max_eval_samples": 20, "rows_per_batch": 16}
    directory = train(recipe("generate", tmp_path, data=data, model=LANGUAGE_MODEL, run=run))
    weights = (directory / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["evaluate", str(directory)]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    given = ["--dynamic-rate", "0.001", "--dynamic-decay", "0.01", "--cache-weight", "0.05", "--cache-size", "100"]
    assert main(["evaluate", str(directory), *given]) == 0
    after = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert after["scores"]["perplexity"] < before["scores"]["perplexity"]
    told = {"dynamic_rate": 0.001, "dynamic_decay": 0.01, "cache_weight": 0.05, "cache_size": 100}
    assert after["adaptation"] == told and "adaptation" not in before
    ways = "-".join(f"{name}={value}" for name, value in told.items())
    assert (directory / f"evaluation-test-{ways}.json").is_file()
    assert (directory / "model.safetensors").read_bytes() == weights
    for wrong, word in (
        (["--dynamic-decay", "0.1"], "dynamic_rate"),
        (["--cache-size", "7"], "cache_weight"),
        (["--cache-weight", "1.5"], "--cache-weight"),
        (["--dynamic-rate", "1e30"], "--dynamic-rate: Input should be less than or equal to 10 "),
        ([str(directory), "--cache-weight", "0.1"], "one language model"),
        (["--dynamic-rate", "10"], "worse than a guess: what was learned on the way may have diverged; lower it"),
    ):
        assert main(["evaluate", str(directory), *wrong]) == 2
        assert word in capsys.readouterr().err


def test_only_language_models_adapt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train(recipe(directory=tmp_path))
    assert main(["evaluate", str(directory), "--cache-weight", "0.1"]) == 2
    assert "language models" in capsys.readouterr().err
