"""R-Drop: its loss by hand, in float64 and loops, for every kind of model; what it does to a model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.losses import IGNORE, Output
from seqmodels.models import Model, build_model
from seqmodels.pretrained import load_pretrained
from tests.training.conftest import TrainUntil
from tests.training.recipes import CLASSIFIER, DECODER, LANGUAGE_MODEL, TEXT_ENCODER, recipe
from training.data.examples import Codec
from training.data.sources import load_rows
from training.objective import RDrop
from training.run import train

ENCODER = {
    "input": "text", "vocab_size": 9, "embedding_size": 6, "dropout": 0.4,
    "recurrent": {"cell": "gru", "hidden_size": 7},
}  # fmt: skip
GENERATES = {"vocab_size": 9, "embedding_size": 6, "dropout": 0.4, "recurrent": {"cell": "lstm", "hidden_size": 7}}
INPUTS = {"inputs": torch.tensor([[4, 5, 6], [7, 8, 0]]), "lengths": torch.tensor([3, 2])}
TEXTS = {"labels": torch.tensor([[2, 4, 5, 3], [2, 6, 3, 0]]), "label_lengths": torch.tensor([4, 3])}
TAGS = {"labels": torch.tensor([[0, 2, 1], [IGNORE, 1, IGNORE]])}
LABELS = {"encoder": ENCODER, "labels": ["a", "b", "c"]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "classifier": (
        {"architecture": "classifier", **LABELS, "label_smoothing": 0.1, "class_weights": {"a": 3.0}},
        {**INPUTS, "labels": torch.tensor([2, IGNORE])},
    ),
    "several labels": (
        {"architecture": "classifier", **LABELS, "problem_type": "multi_label_classification"},
        {**INPUTS, "labels": torch.tensor([[0, 1, 1], [1, 0, 0]])},
    ),
    "tagger": ({"architecture": "tagger", **LABELS}, {**INPUTS, **TAGS}),
    "tagger, CRF": ({"architecture": "tagger", **LABELS, "crf": True}, {**INPUTS, **TAGS}),
    "translator": (
        {"architecture": "generator", "encoder": ENCODER, "decoder": {**GENERATES, "attention": "dot"}},
        {**INPUTS, **TEXTS},
    ),
    "language model": (
        {"architecture": "generator", "decoder": {**GENERATES, "activation_penalty": 2.0}, "label_smoothing": 0.1},
        TEXTS,
    ),
}


def made(kind: str) -> tuple[Model, dict[str, Tensor]]:
    config, batch = KINDS[kind]
    torch.manual_seed(3)
    return build_model(ModelConfig.parse(config)).train(), batch


def by_hand(out: Output, labels: Tensor, alpha: float) -> float:
    """What the paper says of a batch in which each row stands twice."""
    assert out.logits is not None
    logits = out.logits.detach().double()
    half = len(logits) // 2
    places = [(n,) for n in range(half)] if logits.dim() == 2 else [(n, s) for n in range(half) for s in range(3)]
    counted = [place for place in places if labels.dim() != logits.dim() - 1 or int(labels[place]) != IGNORE]
    divergence = 0.0
    for place in counted:
        one, other = (logits[(place[0] + shift, *place[1:])].softmax(-1).tolist() for shift in (0, half))
        divergence += sum(p * math.log(p / q) + q * math.log(q / p) for p, q in zip(one, other, strict=True)) / 2
    assert divergence > 0.001
    return float(out.loss) + alpha / 2 * divergence / len(counted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_paper(kind: str) -> None:
    model, batch = made(kind)
    torch.manual_seed(5)
    plain = model(**{name: torch.cat([value, value]) for name, value in batch.items()})
    torch.manual_seed(5)
    out = RDrop(model, 3.0)(**batch)
    assert out.loss.item() == pytest.approx(by_hand(plain, batch["labels"], 3.0), rel=1e-5)
    assert out.nll.item() == pytest.approx(plain.nll.item(), rel=1e-6)
    assert int(out.num_targets) == int(model(**batch).num_targets)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_it_is_the_models_own_loss(kind: str) -> None:
    model, batch = made(kind)
    model.eval()
    own, held = model(**batch), RDrop(model, 3.0)(**batch)
    assert held.loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    for one, other in zip(gradients(model, own), gradients(model, held), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def gradients(model: Model, out: Output) -> list[Tensor]:
    found = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def test_both_readings_of_running_text_go_on_from_where_they_ended() -> None:
    model, batch = made("language model")
    objective = RDrop(model, 1.0)
    first = objective(**batch)
    assert first.state is not None and len(first.state.values) == 4
    torch.manual_seed(5)
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    plain = model(**twice, state=first.state)
    torch.manual_seed(5)
    out = objective(**batch, state=first.state)
    assert out.loss.item() == pytest.approx(by_hand(plain, batch["labels"], 1.0), rel=1e-5)


def test_a_model_trained_with_it_says_the_same_whatever_is_dropped(tmp_path: Path) -> None:
    encoder = {**TEXT_ENCODER, "dropout": 0.5}
    apart = {}
    for alpha in (None, 5.0):
        run = {"max_steps": 40, "rows_per_batch": 32, "r_drop": alpha}
        settings = {"model": {**CLASSIFIER, "encoder": encoder}, "optim": {"learning_rate": 0.02}, "run": run}
        made = recipe(directory=tmp_path / str(alpha), **settings)
        saved = load_pretrained(train(made))
        rows = load_rows(made, ("validation",))["validation"][:50]
        codec = Codec.of(saved, made.data)
        model = saved.model.train()
        torch.manual_seed(1)
        said = []
        for example in codec.encode(rows):
            inputs, lengths = torch.tensor([example.inputs]), torch.tensor([example.input_length])
            drawn = [model.predict(inputs, lengths)[0].softmax(-1) for _ in range(8)]  # type: ignore[arg-type]
            said.append(torch.stack(drawn).std(0))
        apart[alpha] = torch.cat(said).mean().item()
    assert apart[5.0] < 0.7 * apart[None], apart


@pytest.mark.parametrize("task", ["translate", "generate"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(task: str, tmp_path: Path, train_until: TrainUntil) -> None:
    decoder = {**DECODER, "dropout": 0.3}
    if task == "translate":
        data: dict[str, Any] = {"generated": "numbers-en-fr", "tokenizer": {"kind": "word", "vocab_size": 100}}
        model = {"architecture": "generator", "encoder": TEXT_ENCODER, "decoder": {**decoder, "attention": "dot"}}
    else:
        data = {"generated": "language-model", "tokenizer": {"kind": "word", "vocab_size": 100}, "chunk_length": 8}
        model = {**LANGUAGE_MODEL, "decoder": decoder}
    run = {
        "max_steps": 8,
        "save_steps": 3,
        "logging_steps": 2,
        "rows_per_batch": 8,
        "max_eval_samples": 4,
        "r_drop": 5.0,
    }
    sections = {"data": data, "model": model, "run": run}
    train(recipe(task, tmp_path / "whole", **sections))
    for step in (2, 5, 7):
        train_until(recipe(task, tmp_path / "stopped", **sections), step)
    train(recipe(task, tmp_path / "stopped", **sections))
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    assert load_pretrained(tmp_path / "whole").revision == load_pretrained(tmp_path / "stopped").revision


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, "run.r_drop is 5.0, but nothing differs from one reading of a row to the next: set a dropout"),
        ({"model": {**CLASSIFIER, "encoder": {**TEXT_ENCODER, "embedding_dropout": 0.2}}}, "same for all rows"),
        ({"model": {**CLASSIFIER, "problem_type": "regression", "dropout": 0.1}}, "answers with numbers; remove it"),
        ({"model": {**CLASSIFIER, "dropout": 0.1}, "run": {"r_drop": 0}}, "run.r_drop.*greater than 0"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(sections: dict[str, Any], words: str) -> None:
    run = {"r_drop": 5.0, **sections.pop("run", {})}
    with pytest.raises(ConfigError, match=words):
        recipe(**sections, run=run)
    kept = {**CLASSIFIER, "encoder": {**TEXT_ENCODER, "recurrent": {"cell": "gru", "hidden_size": 8, "zoneout": 0.1}}}
    assert recipe(model=kept, run={"r_drop": 1.0}).run.r_drop == 1.0
