"""Requests that nobody thought of: none may get a 5xx, and the valid ones among them must get the right answer."""

import base64
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from pydantic import BaseModel
from schemathesis import GenerationMode

from seqmodels.pipeline import Pipeline
from serving import schema
from serving.completions import CompletionRequest, CompletionResponse

from .conftest import InProcess, in_process
from .fakes import classification, tags

NUM_MUTATED = 5000
NUM_ON_REAL_MODELS = 1000
NUM_PICTURES = 600
SHAPES: dict[str, type[BaseModel]] = {
    "/v1/classify": schema.ClassifyResponse,
    "/v1/tag": schema.TagResponse,
    "/v1/translate": schema.GenerateResponse,
    "/v1/caption": schema.GenerateResponse,
    "/v1/generate": schema.GenerateResponse,
    "/v1/score": schema.ScoreResponse,
    "/v1/completions": CompletionResponse,
}


@pytest.fixture(scope="module")
def server() -> Iterator[InProcess]:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with in_process() as running:
        yield running
        assert running.runner.num_open == 0
        assert not any(pipeline.live for pipeline in running.pipelines.values())


def check_shape(path: str, response: httpx.Response, documented: set[int]) -> None:
    """No 5xx, a documented status, and a body of the documented shape."""
    assert response.status_code < 500 and response.status_code in documented, (response.status_code, response.text)
    if response.status_code != 200:
        schema.ErrorResponse.model_validate_json(response.content)
    elif not response.headers["content-type"].startswith("text/event-stream"):
        SHAPES[path].model_validate_json(response.content)


@pytest.mark.parametrize("path", SHAPES)
def test_requests_made_from_the_openapi_description(server: InProcess, path: str) -> None:
    document = server.app.openapi()
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    documented = {int(status) for status in document["paths"][path]["post"]["responses"]}
    by_the_book = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    against_it = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=by_the_book | against_it)
    def ask(case: Any) -> None:
        prepared = case.as_transport_kwargs(base_url="http://test")
        sent = {name: prepared[name] for name in ("json", "headers", "params") if prepared.get(name) is not None}
        if isinstance(prepared.get("data"), str | bytes):
            sent["content"] = prepared["data"]
        check_shape(path, server.request("POST", path, **sent), documented)

    ask()


# -- our own: valid requests with answers that are known, and what becomes of them when they are damaged

Answer = Callable[[dict[str, Any]], bool]


def valid_request(chance: random.Random) -> tuple[str, dict[str, Any], Answer]:
    """An endpoint, a body that it must take, and what its answer must say."""
    words = [
        chance.choice(["good", "bad", "größer", "日本", "a\u0000b", "😀", "x" * 50])
        for _ in range(chance.randint(1, 9))
    ]
    text = " ".join(words)
    item = chance.choice([text, {"text": text}, {"words": words}])
    count = chance.randint(1, 3)
    inputs = item if count == 1 else [item] * count
    path = chance.choice(["/v1/classify", "/v1/tag", "/v1/translate", "/v1/generate", "/v1/score", "/v1/completions"])
    if path == "/v1/classify":
        return path, {"inputs": inputs}, lambda body: body["results"] == [classification(text)] * count
    if path == "/v1/tag":
        return path, {"inputs": inputs}, lambda body: body["results"] == [{"tags": tags(text)}] * count
    if path == "/v1/score":
        scored = {"model": "en-de", "inputs": [text] * count, "targets": [text] * count}
        return path, scored, lambda body: [r["score"] for r in body["results"]] == [-1.5 * len(words)] * count
    limit = chance.randint(1, 12)
    expected = " ".join(word.upper() for word in words[:limit])
    if path == "/v1/completions":
        asked = {"model": "story", "prompt": [text] * count, "max_tokens": limit}
        asked |= chance.choice([{}, {"temperature": 0, "logprobs": 2}, {"echo": True, "logprobs": 0}, {"best_of": 3}])
        expected = text + expected if asked.get("echo") else expected
        return path, asked, lambda body: [choice["text"] for choice in body["choices"]] == [expected] * count
    options: dict[str, Any] = {"max_new_tokens": limit}
    if chance.random() < 0.5:
        options |= chance.choice([{"num_beams": 4}, {"do_sample": True, "temperature": 0.7, "seed": 2**63 - 1}])
    return (
        path,
        {"inputs": inputs, **options},
        lambda body: [result["sequences"][0]["text"] for result in body["results"]] == [expected] * count,
    )


def strange_value(chance: random.Random) -> Any:
    deep: Any = 1
    for _ in range(chance.randint(1, 150)):
        deep = [deep] if chance.random() < 0.5 else {"text": deep}
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1.5,
        1e308,
        10**25,
        "",
        " ",
        "\x00",
        "a" * 25_000,
        [],
        [None],
        [[]],
        {},
        {"text": None},
    ]
    odd += [{"text": "a", "image": "b"}, {"image": "AAAA"}, {"frames": []}, {"features": [[]]}, {"features": [[1e39]]}]
    odd += [{"words": [""]}, {"words": []}, ["a"] * 300, float("nan"), float("inf"), -float("inf"), "\ud800", deep]
    return chance.choice(odd)


def damaged_value(chance: random.Random, body: dict[str, Any]) -> bytes:
    """The body with fields replaced, added and taken away."""
    names = [*body, *schema.TranslateRequest.model_fields, *CompletionRequest.model_fields]
    names += ["unknown", "__proto__", "\ud834"]
    for _ in range(chance.randint(1, 3)):
        if body and chance.random() < 0.2:
            body.pop(chance.choice(list(body)))
        else:
            body[chance.choice(names)] = strange_value(chance)
    return json.dumps(body).encode()  # NaN and lone surrogates are written as Python writes them


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """The bytes with some cut out, put in, repeated or flipped."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        noise = chance.choice(
            [b"\x00", b"\xff\xfe", b"NaN", b"\\ud800", b'"', b"{", b"[" * 500, b"1e9999", b"\xef\xbb\xbf"]
        )
        data = chance.choice([data[:at], data[:at] + noise + data[at:], data[at:] + data[:at], data + data])
    return data


CONTENT_TYPES = [
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "image/png",
    "",
    "multipart/form-data",
]


def ask_damaged(server: InProcess, chance: random.Random, path: str, body: dict[str, Any]) -> httpx.Response:
    whole = chance.random() < 0.5
    content = damaged_value(chance, body) if whole else damaged_bytes(chance, json.dumps(body).encode())
    content_type = CONTENT_TYPES[0] if chance.random() < 0.8 else chance.choice(CONTENT_TYPES)
    path = path if chance.random() < 0.8 else chance.choice(list(SHAPES))
    response = server.request("POST", path, content=content, headers={"content-type": content_type})
    check_shape(path, response, documented={200, *range(400, 500)})
    return response


def test_damaged_requests_and_a_fifth_valid_ones(server: InProcess) -> None:
    chance = random.Random(7)
    statuses: Counter[int] = Counter()
    for number in range(NUM_MUTATED):
        path, body, is_right = valid_request(chance)
        if number % 5 == 0:
            response = server.post(path, body)
            assert response.status_code == 200, response.text
            assert is_right(response.json()), (path, body, response.text)
        else:
            response = ask_damaged(server, chance, path, body)
        statuses[response.status_code] += 1
    assert statuses[200] >= NUM_MUTATED // 5
    assert {400, 404, 413, 415, 422} <= set(statuses), statuses


def test_damaged_requests_to_real_models(models: dict[str, str]) -> None:
    pipelines = {name: Pipeline.from_pretrained(directory) for name, directory in models.items()}
    for name in ("motion", "series", "topics", "rating"):  # so that every task has one model, and `model` is optional
        del pipelines[name]
    chance = random.Random(11)
    statuses: Counter[int] = Counter()
    with in_process(pipelines, limits={"max_new_tokens": 16}) as server:
        for number in range(NUM_ON_REAL_MODELS):
            path, body, _ = valid_request(chance)
            if number % 5:
                statuses[ask_damaged(server, chance, path, body).status_code] += 1
            else:
                check_shape(path, server.post(path, body), {200, 413, 415})  # words, say, are for taggers alone
        assert server.runner.num_open == 0
    assert statuses[200] and statuses[400]


# -- pictures


def pictures() -> list[bytes]:
    """One in each format, with a block of EXIF where the format has one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    files = []
    for mode, form in [
        ("RGB", "JPEG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
    ]:
        file = io.BytesIO()
        options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
        Image.new(mode, (13, 11), 40000 if mode == "I;16" else 7).save(file, form, **options)
        files.append(file.getvalue())
    return files


def damaged_picture(chance: random.Random, data: bytes) -> bytes:
    """Cut short, with bytes flipped (in the block of EXIF, if it has one), or with some put in or repeated."""
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return damaged_bytes(chance, data)
    block = max(data.find(b"Exif"), data.find(b"eXIf"), data.find(b"EXIF"), 0) if kind == 2 else 0
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = min(block + chance.randrange(120), len(data) - 1) if kind == 2 else chance.randrange(len(data))
        changed[at] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_to_real_models(models: dict[str, str]) -> None:
    pipelines = {name: Pipeline.from_pretrained(models[name]) for name in ("describe", "motion")}
    chance = random.Random(13)
    files = pictures()
    documented = {200, 400, 413, 415}
    statuses: Counter[int] = Counter()
    raw = {"headers": {"content-type": "image/jpeg"}}
    with in_process(pipelines, limits={"max_new_tokens": 4}) as server:
        for file in files:
            assert server.request("POST", "/v1/caption", content=file, **raw).status_code == 200
        for number in range(NUM_PICTURES):
            data = damaged_picture(chance, chance.choice(files))
            if number % 2:
                path, response = "/v1/caption", server.request("POST", "/v1/caption", content=data, **raw)
            else:
                frames = [base64.b64encode(file).decode() for file in (files[0], data)]
                path, response = "/v1/tag", server.post("/v1/tag", {"inputs": {"frames": frames}})
            check_shape(path, response, documented)
            statuses[response.status_code] += 1
        assert server.runner.num_open == 0
    assert min(statuses[200], statuses[400], statuses[415]) > NUM_PICTURES // 50, statuses
