"""Models saved by earlier versions load and answer as they did: the same tokens, scores within 1e-5."""

import json
from typing import Any

import pytest
import torch

from tests.golden.make import HERE, INPUTS, answers


def approximately(value: Any) -> Any:
    """The same value, with room of 1e-5 for each float."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    return [approximately(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", INPUTS)
def test_a_golden_model_answers_as_it_did(name: str) -> None:
    saved = json.loads((HERE / f"{name}.json").read_text())
    now = answers(name)
    assert torch.allclose(torch.tensor(now["scores"]), torch.tensor(saved["scores"]), atol=1e-5)
    assert now["answers"] == approximately(saved["answers"])


def test_golden_models_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 1_000_000
