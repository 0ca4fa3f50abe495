"""/v1/completions: OpenAI's shapes, defaults and refusals."""

from typing import Any

import pytest

from .conftest import InProcess, error_of, events_of


def test_completion_in_openai_shape(server: InProcess) -> None:
    body = {"model": "story", "prompt": ["a b", "c"], "n": 2, "max_tokens": 9, "seed": 1, "logprobs": 0, "user": "me"}
    answer = server.post("/v1/completions", body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "A B"), (1, "A B #1"), (2, "C"), (3, "C #1"),
    ]  # fmt: skip
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


def test_completion_stream(server: InProcess) -> None:
    body = {"model": "en-de", "prompt": ["a b", "c"], "n": 2, "max_tokens": 2, "stream": True}
    body["stream_options"] = {"include_usage": True}
    events = events_of(server.post("/v1/completions", body))
    assert events[-1] == (None, "[DONE]")
    assert events[-2][1]["choices"] == [] and events[-2][1]["usage"]["completion_tokens"] == 8
    texts: dict[int, str] = {}
    for _, chunk in events[:-2]:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "A B", 1: "A B #1", 2: "C", 3: "C #1"}
    assert [choice["finish_reason"] for choice in events[-3][1]["choices"]] == ["length", "length", "stop", "length"]
    assert len({chunk["id"] for _, chunk in events[:-1]}) == 1


def test_completion_defaults_and_greedy(server: InProcess) -> None:
    text = " ".join("abcdefghijklmnopqrst")
    (choice,) = server.post("/v1/completions", {"model": "story", "prompt": text, "temperature": 0}).json()["choices"]
    assert choice["text"] == text[:31].upper() and choice["finish_reason"] == "length"  # 16 tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"), ("echo", True), ("presence_penalty", 0.5), ("frequency_penalty", -1), ("best_of", 3),
        ("logit_bias", {"50256": -100}), ("logprobs", 2),
    ],
)  # fmt: skip
def test_completion_refuses_by_name_what_it_cannot_do(server: InProcess, field: str, value: Any) -> None:
    error = error_of(server.post("/v1/completions", {"model": "story", "prompt": "a", field: value}), 400)
    assert error["param"] == field and error["code"] == "unsupported_value"


def test_completion_accepts_neutral_and_unknown_fields(server: InProcess) -> None:
    neutral: dict[str, Any] = {
        "suffix": None,
        "echo": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
    }
    body = {"model": "story", "prompt": "a", "best_of": 1, "some_new_field": [1], **neutral}
    assert server.post("/v1/completions", body).status_code == 200
