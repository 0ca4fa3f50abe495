"""Every endpoint over fake pipelines: its right answer, each documented error, and streams that say the same."""

import asyncio
import base64
import json
import re
import threading
import time
from typing import Any

import httpx
import pytest

from seqmodels.pipeline import Pipeline
from serving.app import build_app
from serving.auth import hash_key
from serving.config import ServeConfig
from serving.runner import Runner

from .conftest import InProcess, in_process
from .fakes import FakePipeline, classification, png, tags

PNG = base64.b64encode(png()).decode()
INPUTS = {
    "/v1/classify": "a good day",
    "/v1/tag": "a good day",
    "/v1/translate": "a good day",
    "/v1/caption": {"image": PNG},
    "/v1/generate": "a good day",
}
TEXTS = [path for path in INPUTS if path not in ("/v1/classify", "/v1/tag")]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx.Response) -> list[tuple[str | None, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        events.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return events


# -- right answers


def test_classify(server: InProcess) -> None:
    response = server.post("/v1/classify", {"inputs": ["a good day", {"text": "rain"}, {"words": ["good"]}]})
    assert response.status_code == 200
    assert response.json() == {
        "model": "mood",
        "revision": "0123456789ab",
        "results": [classification("a good day"), classification("rain"), classification("good")],
        "usage": {"input_tokens": 5, "output_tokens": 5},
    }


def test_tag(server: InProcess) -> None:
    response = server.post("/v1/tag", {"inputs": "Ada lives", "model": "names"})
    assert response.json()["results"] == [{"tags": tags("Ada lives")}]


def test_translate(server: InProcess) -> None:
    body = {"inputs": ["ein hund", "eine katze"], "num_beams": 2, "num_return_sequences": 2, "logprobs": True}
    first, second = server.post("/v1/translate", body).json()["results"]
    assert [sequence["text"] for sequence in first["sequences"]] == ["EIN HUND", "EIN HUND #1"]
    assert second["sequences"][0]["logprobs"] == [-0.5, -0.5]
    assert "seed" not in first


def test_null_means_the_default_of_the_model(server: InProcess) -> None:
    with_null = server.post("/v1/translate", {"inputs": "a b", "num_beams": None, "stop": None, "model": None}).json()
    assert with_null == server.post("/v1/translate", {"inputs": "a b"}).json()


def test_caption_takes_base64_and_raw_bytes(server: InProcess) -> None:
    in_json = server.post("/v1/caption", {"inputs": {"image": PNG}, "max_new_tokens": 2})
    raw = server.request(
        "POST", "/v1/caption?max_new_tokens=2", content=png(), headers={"content-type": "image/png; a=b"}
    )
    assert in_json.status_code == 200
    assert raw.json() == in_json.json()
    assert raw.json()["results"][0]["sequences"][0]["text"] == "PICTURE 4"
    assert raw.json()["results"][0]["sequences"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("seed=1&do_sample=true&seed=2", "invalid_value", "seed is given 2 times; give it once"),
        ("model=describe&model=describe", "invalid_value", "model is given 2 times; give it once"),
        ("beams=1&beams=2", "unknown_field", "beams is not a field of this request"),
    ],
)
def test_an_option_of_a_raw_picture_stands_once(server: InProcess, query: str, code: str, message: str) -> None:
    headers = {"content-type": "image/png"}
    error = error_of(server.request("POST", f"/v1/caption?{query}", content=png(), headers=headers), 400)
    assert (error["code"], error["param"], error["message"]) == (code, query.partition("=")[0], message)


def test_raw_picture_above_the_limit() -> None:
    with in_process(limits={"image_bytes": 10}) as server:
        response = server.request("POST", "/v1/caption", content=png(), headers={"content-type": "image/png"})
        error = error_of(response, 413)
        assert error["param"] == "inputs" and f"has {len(png())} bytes" in error["message"]


def test_generate_from_a_prompt_and_freely(server: InProcess) -> None:
    body = {"inputs": "once upon", "do_sample": True, "seed": 5, "num_return_sequences": 2}
    (result,) = server.post("/v1/generate", body).json()["results"]
    assert result["seed"] == 5 and [s["text"] for s in result["sequences"]] == ["ONCE UPON", "ONCE UPON #1"]
    assert server.post("/v1/generate", {}).json()["results"][0]["sequences"][0]["text"] == "FREELY"


def test_score(server: InProcess) -> None:
    body = {"model": "en-de", "inputs": ["a", "b"], "targets": ["x y", "z"]}
    assert server.post("/v1/score", body).json()["results"] == [
        {"score": -3.0, "logprobs": [-1.5, -1.5], "tokens": ["x", "y"]},
        {"score": -1.5, "logprobs": [-1.5], "tokens": ["z"]},
    ]
    alone = server.post("/v1/score", {"model": "story", "targets": "x y"})
    assert alone.json()["results"][0]["score"] == -3.0


def test_models(server: InProcess) -> None:
    cards = server.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [(card["id"], card["task"], card["input"]) for card in cards["data"]] == [
        ("mood", "classify", "text"),
        ("names", "tag", "text"),
        ("en-de", "translate", "text"),
        ("describe", "caption", "image"),
        ("story", "generate", "nothing"),
    ]


def test_one_model_by_its_name(server: InProcess) -> None:
    cards = server.get("/v1/models").json()["data"]
    assert [server.get(f"/v1/models/{card['id']}").json() for card in cards] == cards
    error = error_of(server.get("/v1/models/nobody"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "mood, names, en-de" in error["message"] and "nobody" not in error["message"]


def test_health(server: InProcess) -> None:
    assert server.get("/healthz").json() == {"alive": True}
    head = server.request("HEAD", "/healthz")
    assert head.status_code == 200 and head.content == b""
    report = server.get("/readyz")
    assert report.status_code == 200 and report.json()["ready"] and report.json()["num_threads"] >= 1
    assert report.json()["models"]["mood"] == {"rows_live": 0, "rows_total": 256, "waiting": 0, "batch_invariant": True}
    assert server.get("/docs").status_code == 200


def test_openapi_describes_every_request_with_an_example(server: InProcess) -> None:
    document = server.get("/openapi.json").json()
    posts = [path for path, methods in document["paths"].items() if "post" in methods]
    assert sorted(posts) == sorted([*INPUTS, "/v1/score", "/v1/completions"])
    for path in posts:
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert document["components"]["schemas"][reference.rsplit("/", 1)[1]]["example"]


# -- streams


@pytest.mark.parametrize("path", TEXTS)
def test_stream_says_what_the_answer_says(server: InProcess, path: str) -> None:
    body = {"inputs": [INPUTS[path]] * 3, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    whole = server.post(path, body).json()
    events = events_of(server.post(path, {**body, "stream": True}))
    assert {name for name, _ in events[:-1]} == {"delta"}
    assert events[-1] == ("answer", whole)
    texts: dict[tuple[int, int], str] = {}
    for _, delta in events[:-1]:
        key = (delta["index"], delta["sequence"])
        texts[key] = texts.get(key, "") + delta["delta"]
    for index, result in enumerate(whole["results"]):
        for number, sequence in enumerate(result["sequences"]):
            assert texts[index, number] == sequence["text"]


def test_raw_caption_streams_too(server: InProcess) -> None:
    response = server.request("POST", "/v1/caption?stream=true", content=png(), headers={"content-type": "image/png"})
    assert events_of(response)[-1][1]["results"][0]["sequences"][0]["text"] == "PICTURE 4 BY 3"


def test_error_after_the_first_byte_is_an_event(server: InProcess) -> None:
    events = events_of(server.post("/v1/translate", {"inputs": ["a b c", "poison"], "stream": True}))
    assert events[-1][0] == "error" and events[-1][1]["error"]["code"] == "invalid_value"
    chunks = events_of(server.post("/v1/completions", {"model": "story", "prompt": "poison", "stream": True}))
    assert "error" in chunks[-2][1] and chunks[-1] == (None, "[DONE]")


# -- completions


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


def test_details_of_an_answer(models: dict[str, str]) -> None:
    """From real models: a text's positions are its tokens, a picture's the cells of a grid; a stream tells the same."""
    pipelines = {name: Pipeline.from_pretrained(models[name]) for name in ("en-de", "describe", "story")}
    options = {"max_new_tokens": 5, "top_logprobs": 2, "output_attentions": True}
    with in_process(pipelines, limits={"details": 5 * (2 * 2 + 16)}) as server:
        answer = server.post("/v1/translate", {"inputs": "a dog", **options}).json()
        (result,) = answer["results"]
        assert result["source_tokens"] == ["a", "Ġ", "d", "o", "g", "<eos>"]
        (sequence,) = result["sequences"]
        assert len(sequence["tokens"]) == len(sequence["top_logprobs"]) == len(sequence["attentions"])
        assert set(sequence["top_logprobs"][0][1]) == {"token", "logprob"}
        assert all(sum(weights) == pytest.approx(1) and len(weights) == 6 for weights in sequence["attentions"])
        stream = server.post("/v1/translate", {"inputs": "a dog", "stream": True, **options})
        assert events_of(stream)[-1] == ("answer", answer)
        (result,) = server.post("/v1/caption", {"inputs": {"image": PNG}, **options}).json()["results"]
        assert result["source_grid"] == [4, 4] and len(result["sequences"][0]["attentions"][0]) == 16
        error = error_of(server.post("/v1/translate", {"inputs": ["a dog"] * 3, **options}), 400)
        assert (error["param"], error["code"]) == ("output_attentions", "limit_exceeded")
        error = error_of(server.post("/v1/generate", {"inputs": "a", "output_attentions": True}), 400)
        assert (error["param"], error["code"]) == ("output_attentions", "invalid_value")
        assert "which this model has not" in error["message"]


# -- errors


BAD_BODIES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"inputs": "x", "num_beams": 64}, 400, "limit_exceeded", "num_beams"),
    ({"inputs": "x", "max_new_tokens": 10**30}, 400, "limit_exceeded", "max_new_tokens"),
    ({"inputs": "x", "num_beams": 0}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "num_beams": 2.5}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "num_beams": True}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "temperature": 0.5}, 400, "invalid_value", "temperature"),
    ({"inputs": "x", "beams": 4}, 400, "unknown_field", "beams"),
    ({"inputs": "x", "return_state": True}, 400, "unknown_field", "return_state"),
    ({"inputs": "x", "state": "AAAA"}, 400, "unknown_field", "state"),
    ({"inputs": {"text": "x", "state": "AAAA"}}, 400, "invalid_input", "inputs"),
    ({"inputs": "x", "stop": "a"}, 400, "invalid_value", "stop"),
    ({"inputs": "x", "stop": [""]}, 400, "invalid_value", "stop[0]"),
    ({"inputs": "x", "bad_words": ["a" * 101]}, 413, "too_long", "bad_words"),
    ({"inputs": "x", "bad_words": [7] * 100_000}, 400, "invalid_value", "bad_words[0]"),
    ({"inputs": "x", "repetition_penalty": 0.001}, 400, "invalid_value", "repetition_penalty"),
    ({"inputs": "x", "no_repeat_ngram_size": 101}, 400, "invalid_value", "no_repeat_ngram_size"),
    ({"inputs": "x", "top_k": 2**31}, 400, "invalid_value", "top_k"),
    ({"inputs": "x", "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"inputs": "x", "output_attentions": 1}, 400, "invalid_value", "output_attentions"),
    ({"inputs": "x", "coverage_penalty": -0.1}, 400, "invalid_value", "coverage_penalty"),
    ({"inputs": "x", "stop": ["a"] * 9}, 413, "too_long", "stop"),
    ({}, 400, "missing_field", "inputs"),
    ({"inputs": []}, 422, "empty", "inputs"),
    ({"inputs": ""}, 422, "empty", "inputs"),
    ({"inputs": ["a", "b", "c", ""]}, 422, "empty", "inputs[3]"),
    ({"inputs": ["a", 7]}, 400, "invalid_input", "inputs[1]"),
    ({"inputs": [["a"]]}, 400, "invalid_input", "inputs[0]"),
    ({"inputs": [{"words": ["a", 7]}]}, 400, "invalid_value", "inputs[0].words[1]"),
    ({"inputs": {"text": "a", "words": ["a"]}}, 400, "invalid_input", "inputs"),
    ({"inputs": {"sound": "a"}}, 400, "invalid_input", "inputs"),
    ({"inputs": "a " * 31}, 413, "too_long", "inputs"),
    ({"inputs": "a" * 20_001}, 413, "too_long", "inputs"),
    ({"inputs": ["a"] * 257}, 413, "too_long", "inputs"),
    ({"inputs": {"image": PNG}}, 415, "unsupported_input", "inputs"),
    ({"inputs": {"image": "no base64!"}}, 400, "invalid_base64", "inputs.image"),
    ({"inputs": {"image": "é"}}, 400, "invalid_base64", "inputs.image"),
    ({"inputs": {"image": "A" * 6_000_000}}, 413, "too_long", "inputs.image"),
    ({"inputs": {"frames": [PNG] * 65}}, 413, "too_long", "inputs.frames"),
    ({"inputs": {"features": [[1, "2"]]}}, 400, "invalid_value", "inputs.features[0][1]"),
    ({"inputs": {"words": ["a"] * 2001}}, 413, "too_long", "inputs.words"),
    ({"inputs": "x", "model": "nobody"}, 404, "model_not_found", "model"),
    ({"inputs": "x", "model": "../en-de"}, 404, "model_not_found", "model"),
    ({"inputs": "x", "model": "mood"}, 400, "wrong_task", "model"),
    ({"inputs": "refuse at submit"}, 400, "invalid_value", "inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "param"), BAD_BODIES)
def test_bad_fields(server: InProcess, body: dict[str, Any], status: int, code: str, param: str | None) -> None:
    error = error_of(server.post("/v1/translate", body), status)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


def test_the_message_of_the_design(server: InProcess) -> None:
    error = error_of(server.post("/v1/translate", {"inputs": "A dog runs.", "num_beams": 64}), 400)
    assert error["message"] == "num_beams is 64, but this server allows at most 16"


BAD_BYTES: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"null", 400, "invalid_value"),
    (b"[]", 400, "invalid_value"),
    (b'{"inputs": "\xff"}', 400, "invalid_json"),
    (b'{"inputs": "\\ud800"}', 400, "invalid_json"),
    (b'{"\\udc00": 1}', 400, "invalid_json"),
    (b'{"inputs": "x", "length_penalty": NaN}', 400, "invalid_value"),
    (b'{"inputs": "x", "length_penalty": -Infinity}', 400, "invalid_value"),
    (b'{"inputs": "x", "length_penalty": 1e999}', 400, "invalid_value"),
    (b'{"inputs": {"features": [[NaN]]}}', 400, "invalid_value"),
    (b'{"inputs": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b'{"inputs": ' + b"[" * 200_000, 400, "invalid_json"),
    (b'{"inputs": ' + b'{"a":' * 200_000, 400, "invalid_json"),
    (b'{"inputs": {"words": [' + b"1," * 1_000_000 + b"1]}}", 400, "invalid_value"),
    (b'{"inputs": "' + b"a" * 9_000_000 + b'"}', 413, "body_too_large"),
]


@pytest.mark.parametrize(("content", "status", "code"), BAD_BYTES, ids=range(len(BAD_BYTES)))
def test_bad_bytes(server: InProcess, content: bytes, status: int, code: str) -> None:
    response = server.request("POST", "/v1/translate", content=content, headers={"content-type": "application/json"})
    assert error_of(response, status)["code"] == code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"inputs": "\\ud800"}', "hex escape"),
        (b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}", "recursion limit"),
        (b'{"inputs": "x"', "EOF"),
        (b'{"inputs": "x", "seed": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"targets": 3}', "targets is neither a string nor a list of strings"),
        (b'{"targets": "a", "inputs": 3}', "inputs is neither a string nor an object with exactly one of text, words"),
    ],
)
def test_the_reason_is_told(server: InProcess, content: bytes, message: str) -> None:
    response = server.request("POST", "/v1/score", content=content, headers={"content-type": "application/json"})
    assert message in error_of(response, 400)["message"]


def test_names_of_unknown_fields_are_not_echoed_at_any_length(server: InProcess) -> None:
    for name in ("<script>", "a" * 1000):
        response = server.post("/v1/translate", {"inputs": "x", name: 1})
        assert error_of(response, 400)["param"] == "?" and name not in response.text


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\x80"]
)
def test_wrong_content_type(server: InProcess, content_type: str) -> None:
    headers = {"content-type": content_type.encode("latin-1")}
    response = server.request("POST", "/v1/translate", content=b'{"inputs": "x"}', headers=headers)
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_body_limit_holds_without_a_declared_length(server: InProcess) -> None:
    taken = 0

    async def chunks() -> Any:
        nonlocal taken
        while taken < 100 * 2**20:
            taken += 2**20
            yield b" " * 2**20

    response = server.request("POST", "/v1/translate", content=chunks(), headers={"content-type": "application/json"})
    assert error_of(response, 413)["code"] == "body_too_large"
    assert taken <= 10 * 2**20


def test_not_found_and_method_not_allowed(server: InProcess) -> None:
    assert error_of(server.get("/v1/nothing"), 404)["code"] == "not_found"
    response = server.get("/v1/translate")
    assert error_of(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"


def test_model_must_be_named_where_two_serve_the_task() -> None:
    pipelines = {name: FakePipeline("translate", name) for name in ("en-de", "en-fr")}
    with in_process(pipelines) as server:
        error = error_of(server.post("/v1/translate", {"inputs": "x"}), 400)
        assert error["code"] == "model_required" and "en-de, en-fr" in error["message"]
        assert server.post("/v1/translate", {"inputs": "x", "model": "en-fr"}).json()["model"] == "en-fr"
        assert error_of(server.post("/v1/tag", {"inputs": "x"}), 404)["code"] == "no_model"


def test_truncate(server: InProcess) -> None:
    response = server.post("/v1/translate", {"inputs": "a " * 31, "truncate": True})
    assert response.json()["usage"]["input_tokens"] == 30


def test_score_needs_as_many_targets_as_inputs(server: InProcess) -> None:
    error = error_of(server.post("/v1/score", {"model": "en-de", "inputs": ["a", "b"], "targets": ["c"]}), 400)
    assert error["param"] == "targets"


@pytest.mark.parametrize(("text", "status"), [("", 422), ("a " * 31, 413), ("a" * 20_001, 413)])
def test_score_names_the_item_at_fault(server: InProcess, text: str, status: int) -> None:
    for field in ("inputs", "targets"):
        body = {"model": "en-de", "inputs": ["a", "b"], "targets": ["c", "d"], field: ["a", text]}
        assert error_of(server.post("/v1/score", body), status)["param"] == f"{field}[1]"


@pytest.mark.parametrize("truncate", [True, False])
def test_the_limit_of_the_server_does_not_advise_truncate(server: InProcess, truncate: bool) -> None:
    error = error_of(server.post("/v1/translate", {"inputs": "a" * 20_001, "truncate": truncate}), 413)
    assert error["message"] == "inputs has 20001 characters, but this server allows at most 20000; send less"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", ""])
def test_a_time_limit_that_is_none(server: InProcess, seconds: str) -> None:
    response = server.post("/v1/translate", {"inputs": "x"}, headers={"x-request-timeout-seconds": seconds})
    assert error_of(response, 400)["code"] == "invalid_value"


def test_deadline(server: InProcess) -> None:
    pipeline = FakePipeline("translate", step_s=0.05)
    with in_process({"slow": pipeline}) as slow:
        headers = {"x-request-timeout-seconds": "0.3"}
        response = slow.post("/v1/translate", {"inputs": "a " * 30}, headers=headers)
        assert error_of(response, 408)["code"] == "deadline_passed"
        assert not pipeline.live
        events = events_of(slow.post("/v1/translate", {"inputs": "a " * 30, "stream": True}, headers=headers))
        assert events[0][0] == "delta" and events[-1][0] == "error"


@pytest.mark.parametrize("seconds", [0.15, 0.3])
def test_a_short_deadline_is_answered_before_it_passes(seconds: float) -> None:
    """Ray's proxy would answer in bare text then. A step in mid-turn does not hold the answer back."""
    with in_process({"slow": FakePipeline("translate", step_s=1.0)}) as slow:
        started = time.monotonic()
        headers = {"x-request-timeout-seconds": str(seconds)}
        assert error_of(slow.post("/v1/translate", {"inputs": "a b"}, headers=headers), 408)
        assert time.monotonic() - started < seconds + 0.3  # what a busy machine may add; a step takes a second


@pytest.mark.parametrize("path", [*INPUTS, "/v1/score", "/v1/completions"])
def test_every_pipeline_is_told_the_deadline(path: str) -> None:
    bodies: dict[str, Any] = {
        "/v1/score": {"model": "story", "targets": "x"},
        "/v1/completions": {"model": "story", "prompt": "x"},
    }
    with in_process() as server:
        latest = time.monotonic() + 5
        body = bodies.get(path) or {"inputs": INPUTS[path]}
        assert server.post(path, body, headers={"x-request-timeout-seconds": "5"}).status_code == 200
        ((job,),) = (pipeline.submitted for pipeline in server.pipelines.values() if pipeline.submitted)
        assert latest - 0.3 < job.deadline < latest + 2


def test_a_stalled_engine_answers_408_and_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.service.GRACE_S", 0.2)
    pipeline = FakePipeline("translate")
    with in_process({"slow": pipeline}, stall_after_s=0.4) as server:
        pipeline.gate.clear()
        response = server.post("/v1/translate", {"inputs": "a"}, headers={"x-request-timeout-seconds": "0.5"})
        assert error_of(response, 408)["code"] == "deadline_passed"
        report = server.get("/readyz")
        assert report.status_code == 503 and report.json()["turning"] is False
        assert server.get("/healthz").status_code == 200


def test_engine_failure_is_500_with_a_fixed_text_and_the_service_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    with in_process() as server:
        server.pipelines["mood"].failing_steps = 1
        response = server.post("/v1/classify", {"inputs": "x"})
        error = error_of(response, 500)
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert "secret" not in response.text and "secret detail" in caplog.text
        assert server.post("/v1/classify", {"inputs": "x"}).status_code == 200


def test_unexpected_exception_is_500_with_a_fixed_text(caplog: pytest.LogCaptureFixture) -> None:
    with in_process() as server:
        server.pipelines["mood"].prepare = lambda *args, **kwargs: 1 / 0
        response = server.post("/v1/classify", {"inputs": "x"})
        assert error_of(response, 500)["code"] == "internal_error"
        assert "division" not in response.text and "ZeroDivisionError" in caplog.text


# -- keys


KEY = "correct-horse-battery-staple"


def test_every_route_but_health_needs_the_key() -> None:
    with in_process(key_hashes=(hash_key("another key, long enough"), hash_key(KEY))) as server:
        routes = [("GET", "/v1/models"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing")]
        routes += [("POST", path) for path in [*INPUTS, "/v1/score", "/v1/completions"]]
        for method, path in routes:
            for header in (None, "Bearer wrong", f"Basic {KEY}", "Bearer", "Bearer ", b"Bearer \xff\xfe"):
                headers = {} if header is None else {"authorization": header}
                response = server.request(method, path, headers=headers)
                error = error_of(response, 401)
                assert error["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"
        assert server.get("/healthz").status_code == server.get("/readyz").status_code == 200
        server.headers = {"authorization": f"Bearer {KEY}"}
        assert server.get("/v1/models").status_code == 200
        assert server.post("/v1/classify", {"inputs": "x"}).status_code == 200


# -- counting


def test_every_answer_is_counted_by_route_and_status() -> None:
    seen: list[tuple[str, int]] = []
    config = ServeConfig.parse({"models": {"mood": "unused"}})
    runner: Runner[Any] = Runner({"mood": FakePipeline("classify", "mood")})
    app = build_app(runner, config, observe=lambda route, status, seconds: seen.append((route, status)))
    with InProcess(app, runner).running() as server:
        server.post("/v1/classify", {"inputs": "x"})
        server.post("/v1/classify", {})
        server.get("/v1/made/up")
        server.pipelines["mood"].failing_steps = 1
        server.post("/v1/classify", {"inputs": "x"})
    assert seen == [("/v1/classify", 200), ("/v1/classify", 400), ("none", 404), ("/v1/classify", 500)]


# -- load


def test_full_queue_is_429_and_clears() -> None:
    pipeline = FakePipeline("translate")
    with in_process({"slow": pipeline}, max_requests=2, limits={"inputs": 2}) as server:

        async def crowd() -> list[httpx.Response]:
            pipeline.gate.clear()
            tasks = [asyncio.create_task(server.send("POST", "/v1/translate", json={"inputs": "a"})) for _ in range(5)]
            await asyncio.sleep(0.3)
            pipeline.gate.set()
            return await asyncio.gather(*tasks)

        responses = server.wait(crowd())
        assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert error_of(refused, 429)["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/translate", {"inputs": ["a", "b"]}).status_code == 200


async def crowd(server: InProcess, count: int, **kwargs: Any) -> list[int]:
    """The statuses of so many calls at once, each with half a second to live."""
    headers = {"content-type": "application/json", "x-request-timeout-seconds": "0.5"}
    calls = [server.send("POST", "/v1/translate", headers=headers, **kwargs) for _ in range(count)]
    return sorted(response.status_code for response in await asyncio.wait_for(asyncio.gather(*calls), 2))


def test_calls_in_preparation_take_places_and_expire() -> None:
    pipeline = FakePipeline("translate")
    hurry = threading.Event()
    prepare = pipeline.prepare

    def slowly(*args: Any, **kwargs: Any) -> Any:
        hurry.wait(30)
        return prepare(*args, **kwargs)

    pipeline.prepare = slowly  # type: ignore[method-assign]
    with in_process({"slow": pipeline}, max_requests=12, limits={"inputs": 2}) as server:
        for _ in range(2):  # the second time no thread of the pool is free
            assert server.wait(crowd(server, 30, json={"inputs": "a"})) == [408] * 12 + [429] * 18
        assert server.runner.num_open == 0 and not pipeline.submitted
        hurry.set()
        assert server.post("/v1/translate", {"inputs": ["a", "b"]}).status_code == 200


def test_a_body_that_does_not_come_expires(server: InProcess) -> None:
    async def endless() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    assert server.wait(crowd(server, 1, content=endless())) == [408]
    assert server.runner.num_open == 0


def test_the_page_of_documentation_loads_nothing_from_elsewhere(server: InProcess) -> None:
    page = server.request("GET", "/docs")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(addresses) >= 2 and all(address.startswith("/") for address in addresses)
    assert all(server.request("GET", address).status_code == 200 for address in addresses)
