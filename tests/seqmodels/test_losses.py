"""Losses against torch's own, and by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.losses import IGNORE, labelled, measured
from seqmodels.models import SequenceClassifier
from tests.seqmodels.builders import make_model

TEXT = {"input": "text", "vocab_size": 9, "recurrent": {"hidden_size": 4}}
TOKENS, LENGTHS = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_against_labels_with_weights(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4), torch.tensor([[0, 3, IGNORE, 1, 1], [2, 2, IGNORE, IGNORE, 0]])
    weights = torch.rand(2, 5) + 0.5
    counted = labels != IGNORE
    each = [
        (1 - smoothing) * -line[label] - smoothing * line.mean()
        for line, label in zip(logits[counted].log_softmax(-1), labels[counted], strict=True)
    ]
    plain, weighted = labelled(logits, labels, smoothing), labelled(logits, labels, smoothing, weights)
    assert plain.num_targets == weighted.num_targets == 7
    assert torch.allclose(plain.loss, torch.stack(each).mean())
    assert torch.allclose(weighted.loss, (torch.stack(each) * weights[counted]).mean())
    for out in (plain, weighted):
        assert torch.allclose(out.nll, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE))


def test_a_regression_by_hand() -> None:
    numbers, targets = torch.tensor([[1.0, 10.0], [3.0, 30.0]]), torch.tensor([[2.0, 10.0], [3.0, 10.0]])
    out = measured(numbers, targets, deviations=torch.tensor([1.0, 10.0]))
    assert out.num_targets == 4
    assert out.loss == pytest.approx((1 + 0 + 0 + 4) / 4)
    normal = [torch.distributions.Normal(n, d) for n, d in zip(numbers.T, (1.0, 10.0), strict=True)]
    density = sum(float(one.log_prob(t).sum()) for one, t in zip(normal, targets.T, strict=True))
    assert out.nll == pytest.approx(-density / 4)


def test_several_labels_are_as_many_questions() -> None:
    fields = {"architecture": "classifier", "labels": ["a", "b", "c"], "encoder": TEXT}
    single = make_model(**fields)
    several = make_model(**fields, problem_type="multi_label_classification")
    weighted = make_model(**fields, problem_type="multi_label_classification", class_weights={"b": 3.0})
    plain = single.predict(TOKENS, LENGTHS)[0]
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    for model, weight in ((several, 1.0), (weighted, torch.tensor([1.0, 3.0, 1.0]))):
        out = model(inputs=TOKENS, labels=labels, lengths=LENGTHS)
        expected = F.binary_cross_entropy_with_logits(plain, labels.float(), pos_weight=torch.as_tensor(weight))
        assert torch.allclose(out.loss, expected)
        assert out.num_targets == 6
    assert out.logits is not None
    assert torch.allclose(out.logits.softmax(-1)[..., 1], plain.sigmoid())


def test_weights_of_classes_are_those_of_the_targets() -> None:
    fields = {"architecture": "classifier", "labels": ["a", "b"], "encoder": TEXT}
    model = make_model(**fields, class_weights={"b": 4.0})
    logits, labels = model.predict(TOKENS, LENGTHS)[0], torch.tensor([0, 1])
    each = F.cross_entropy(logits, labels, reduction="none")
    out = model(inputs=TOKENS, labels=labels, lengths=LENGTHS)
    assert torch.allclose(out.loss, (each[0] + 4 * each[1]) / 2)
    assert torch.allclose(out.nll, each.mean()), "a measure knows no weights"


def test_a_regression_begins_at_the_mean_and_moves_in_deviations() -> None:
    fields = {"architecture": "classifier", "labels": ["metres"], "encoder": TEXT, "problem_type": "regression"}
    model = make_model(**fields, target_mean=[100.0], target_std=[20.0])
    plain = make_model(**{**fields, "problem_type": "multi_label_classification"})
    assert isinstance(model, SequenceClassifier)
    inner = plain.predict(TOKENS, LENGTHS)[0][..., 1]
    assert torch.allclose(model.predict(TOKENS, LENGTHS)[0], 100 + 20 * inner)


def test_a_temperature_divides_the_logits() -> None:
    fields = {"architecture": "tagger", "labels": ["a", "b"], "encoder": TEXT}
    cold, warm = make_model(**fields), make_model(**fields, temperature=2.5)
    assert torch.allclose(cold.predict(TOKENS, LENGTHS)[0] / 2.5, warm.predict(TOKENS, LENGTHS)[0])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"problem_type": "regression", "labels": ["x"]}, "target_mean"),
        ({"problem_type": "regression", "target_mean": [0.0], "target_std": [1.0], "labels": ["x"],
          "label_smoothing": 0.1}, "label_smoothing"),
        ({"problem_type": "multi_label_classification", "architecture": "tagger"}, "problem_type"),
        ({"target_mean": [1.0], "target_std": [1.0]}, "target_mean"),
        ({"labels": ["a"]}, "labels"),
        ({"temperature": 0.0}, "temperature"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(fields: dict[str, object], named: str) -> None:
    whole = {"architecture": "classifier", "labels": ["a", "b"], "encoder": TEXT, **fields}
    with pytest.raises(ConfigError, match=named):
        ModelConfig.parse(whole)


def test_the_density_of_a_regression_is_that_of_its_own_units() -> None:
    one, two = (torch.tensor([[float(x)]]) for x in (3, 5))
    in_metres = measured(one, two, torch.tensor([2.0])).nll
    in_centimetres = measured(100 * one, 100 * two, torch.tensor([200.0])).nll
    assert float(in_centimetres - in_metres) == pytest.approx(math.log(100), abs=1e-5)
