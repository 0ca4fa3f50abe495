"""Each documented error: its status, its code, and the field that it names."""

import base64
from typing import Any

import pytest
import torch

from seqmodels.config import ModelConfig
from seqmodels.models import build_model
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import Pretrained
from seqmodels.tokenizer import Tokenizer

from .conftest import PNG, InProcess, error_of, events_of, in_process
from .fakes import FakePipeline, gif

CLIPS = {frames: base64.b64encode(gif(frames)).decode() for frames in (64, 65)}

BAD_BODIES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"inputs": "x", "num_beams": 64}, 400, "limit_exceeded", "num_beams"),
    ({"inputs": "x", "max_new_tokens": 10**30}, 400, "limit_exceeded", "max_new_tokens"),
    ({"inputs": "x", "num_beams": 0}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "num_beams": 2.5}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "num_beams": True}, 400, "invalid_value", "num_beams"),
    ({"inputs": "x", "temperature": 0.5}, 400, "invalid_value", "temperature"),
    ({"inputs": "x", "beams": 4}, 400, "unknown_field", "beams"),
    ({"inputs": "x", "return_state": True}, 400, "state_not_supported", "state"),
    ({"inputs": "x", "state": "AAAA"}, 400, "state_invalid", "state"),
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
    ({"inputs": {"frames": [PNG, 7]}}, 400, "invalid_value", "inputs.frames[1]"),
    ({"inputs": {"frames": 7}}, 400, "invalid_input", "inputs.frames"),
    ({"inputs": {"frames": "no base64!"}}, 400, "invalid_base64", "inputs.frames"),
    ({"inputs": {"frames": "A" * 6_000_000}}, 413, "too_long", "inputs.frames"),
    ({"inputs": {"frames": CLIPS[65]}}, 413, "too_long", "inputs.frames"),
    ({"inputs": {"frames": CLIPS[64]}}, 415, "unsupported_input", "inputs"),
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


@pytest.mark.parametrize("search", [{}, {"do_sample": True}, {"num_beams": 3}, {"logprobs": True}])
def test_numbers_that_grow_beyond_all_bounds_are_told(search: dict[str, Any]) -> None:
    """Of a plain recurrence without a bound, whose state doubles at each step."""
    tokenizer = Tokenizer.train([], "byte")
    recurrent = {"cell": "rnn_relu", "hidden_size": 16}
    fields = {"vocab_size": tokenizer.vocab_size, "embedding_size": 8, "recurrent": recurrent}
    model = build_model(ModelConfig.parse({"architecture": "generator", "decoder": fields})).eval()
    for name, parameter in model.named_parameters():
        if "weight_hh" in name:
            torch.nn.init.eye_(parameter.data).mul_(2.0)
    pipeline = Pipeline(Pretrained(model, model.config, "", target_tokenizer=tokenizer))
    with in_process({"f": pipeline}) as server:
        body = {"inputs": "a" * 1000, "max_new_tokens": 3, **search}
        error = error_of(server.post("/v1/generate", body), 400)
        assert "not finite" in error["message"]
        (kind, told) = events_of(server.post("/v1/generate", {**body, "stream": True}))[-1]
        assert kind == "error" and told["error"] == error
        if not search:
            assert error_of(server.post("/v1/completions", {"prompt": "a" * 1000}), 400) == error
            asked = {"prompt": "a" * 1000, "stream": True, "logprobs": 1}
            assert "not finite" in server.post("/v1/completions", asked).text


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
