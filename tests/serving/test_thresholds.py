"""A threshold leaves every number as it is and takes away the labels that are too unlikely."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from seqmodels.pipeline import Pipeline

from .conftest import InProcess, error_of, in_process
from .fakes import png

TEXT = "a good day in Oslo"
FRAMES = [base64.b64encode(png(8, size)).decode() for size in range(8, 14)]


@pytest.fixture(scope="module")
def server(models: dict[str, str]) -> Iterator[InProcess]:
    names = ("mood", "motion", "topics", "rating", "story")
    with in_process({name: Pipeline.from_pretrained(models[name]) for name in names}) as running:
        yield running


def ask(server: InProcess, path: str, model: str, threshold: float | None, inputs: Any = TEXT) -> dict[str, Any]:
    body = {"model": model, "inputs": inputs, "threshold": threshold}
    response = server.post(f"/v1/{path}", body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()["results"][0]
    return result


def test_one_label(server: InProcess) -> None:
    plain = ask(server, "classify", "mood", None)
    assert ask(server, "classify", "mood", plain["score"]) == plain
    assert ask(server, "classify", "mood", plain["score"] + 1e-6) == {**plain, "label": None}


def test_several_labels(server: InProcess) -> None:
    scores = ask(server, "classify", "topics", None)["scores"]
    low, high = sorted(scores.values())
    for threshold, told in ((0.0, 2), (low, 2), ((low + high) / 2, 1), (high, 1), (1.0, 0)):
        answer = ask(server, "classify", "topics", threshold)
        assert answer["scores"] == scores and len(answer["labels"]) == told
        assert all(scores[label] >= threshold for label in answer["labels"])


def test_tags_keep_their_places(server: InProcess) -> None:
    def tags(threshold: float | None) -> Any:
        return ask(server, "tag", "motion", threshold, {"frames": FRAMES})["tags"]

    plain = tags(None)
    threshold = sorted(tag["score"] for tag in plain)[3]
    assert tags(threshold) == [tag if tag["score"] >= threshold else {**tag, "label": None} for tag in plain] != plain
    assert tags(1.0) == [{**tag, "label": None} for tag in plain]


def test_where_there_is_no_probability(server: InProcess) -> None:
    error = error_of(server.post("/v1/classify", {"model": "rating", "inputs": TEXT, "threshold": 0.5}), 400)
    assert error["param"] == "threshold" and "answers with numbers" in error["message"]
    error = error_of(server.post("/v1/generate", {"inputs": TEXT, "threshold": 0.5}), 400)
    assert (error["param"], error["code"]) == ("threshold", "unknown_field")
    for wrong in (-0.1, 1.1, "0.5"):
        error = error_of(server.post("/v1/classify", {"model": "mood", "inputs": TEXT, "threshold": wrong}), 400)
        assert error["param"] == "threshold"
