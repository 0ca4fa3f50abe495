"""Every endpoint over fake pipelines: its right answer, streams that say the same, keys and counts."""

import base64
import re
import threading
from typing import Any

import pytest

from seqmodels.pipeline import Pipeline
from serving.app import build_app
from serving.auth import ApiKey
from serving.config import ModelSet, Settings
from serving.guard import Exchange
from serving.http import as_json, as_long_json
from serving.models import Models
from serving.runner import Runner

from .conftest import INPUTS, PNG, STATE_KEY, TEXTS, InProcess, api_key, error_of, events_of, in_process
from .fakes import FakePipeline, classification, gif, png, tags


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


def test_what_a_model_writes_by_itself_is_bounded_too() -> None:
    with in_process({"en-de": FakePipeline("translate")}, limits={"max_new_tokens": 3}) as server:
        (result,) = server.post("/v1/translate", {"inputs": "one two three four"}).json()["results"]
        assert result["sequences"][0]["text"] == "ONE TWO THREE"
        assert server.post("/v1/translate", {"inputs": "x", "max_new_tokens": 4}).status_code == 400


def test_pictures_that_are_together_above_the_limit() -> None:
    """Each is small enough; drawing them would keep a thread long after the client's deadline."""
    with in_process(limits={"pixels": 2 * 4 * 3}) as server:
        assert server.post("/v1/caption", {"inputs": [{"image": PNG}] * 2}).status_code == 200
        error = error_of(server.post("/v1/caption", {"inputs": [{"image": PNG}] * 3}), 413)
        assert error["param"] == "inputs" and "has 36 pixels or more" in error["message"]
        error = error_of(server.post("/v1/tag", {"inputs": {"frames": [PNG] * 3}}), 413)
        assert error["param"] == "inputs" and "at most 24" in error["message"]
        moving = base64.b64encode(gif(3)).decode()
        error = error_of(server.post("/v1/tag", {"inputs": {"frames": moving}}), 413)
        assert error["param"] == "inputs" and "has 36 pixels or more" in error["message"]


def test_generate_from_a_prompt_and_freely(server: InProcess) -> None:
    body = {"inputs": "once upon", "do_sample": True, "seed": 5, "num_return_sequences": 2}
    (result,) = server.post("/v1/generate", body).json()["results"]
    assert result["seed"] == 5 and [s["text"] for s in result["sequences"]] == ["ONCE UPON", "ONCE UPON #1"]
    assert server.post("/v1/generate", {}).json()["results"][0]["sequences"][0]["text"] == "FREELY"


def test_score(server: InProcess) -> None:
    body = {"model": "en-de", "inputs": ["a", "b"], "targets": ["x y", "z"]}
    assert server.post("/v1/score", body).json()["results"] == [
        {"score": -3.0, "logprobs": [-1.5, -1.5, 0.0], "tokens": ["x", "y", "<eos>"], "offsets": [0, 1, 3]},
        {"score": -1.5, "logprobs": [-1.5, 0.0], "tokens": ["z", "<eos>"], "offsets": [0, 1]},
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
    load = {"rows_live": 0, "rows_waiting": 0, "rows_total": 256, "waiting": 0, "batch_invariant": True}
    assert report.json()["models"]["mood"] == {"revision": "0123456789ab", **load} and report.json()["refused"] == []
    assert server.get("/docs").status_code == 200


def test_openapi_describes_every_request_with_an_example(server: InProcess) -> None:
    document = server.get("/openapi.json").json()
    posts = [path for path, methods in document["paths"].items() if "post" in methods]
    assert sorted(posts) == sorted([*INPUTS, "/v1/score", "/v1/completions", "/v1/batch"])
    for path in posts:
        media_type = "application/x-ndjson" if path == "/v1/batch" else "application/json"
        reference = document["paths"][path]["post"]["requestBody"]["content"][media_type]["schema"]["$ref"]
        assert document["components"]["schemas"][reference.rsplit("/", 1)[1]]["example"]


def test_options_of_a_raw_picture_that_are_lists(server: InProcess) -> None:
    raw = server.request(
        "POST", "/v1/caption?stop=4&stop=x&max_new_tokens=2", content=png(), headers={"content-type": "image/png"}
    )
    in_json = server.post("/v1/caption", {"inputs": {"image": PNG}, "stop": ["4", "x"], "max_new_tokens": 2})
    assert raw.status_code == 200 and raw.json() == in_json.json()
    job = server.pipelines["describe"].submitted[-1]
    assert list(job.params["stop"]) == ["4", "x"]


def test_a_slash_too_many_and_a_packed_body(server: InProcess) -> None:
    assert error_of(server.post("/v1/classify/", {"inputs": "x"}), 404)["code"] == "not_found"
    for path, kind in (("/v1/classify", "application/json"), ("/v1/batch", "application/x-ndjson")):
        headers = {"content-type": kind, "content-encoding": "gzip"}
        error = error_of(server.request("POST", path, content=b"\x1f\x8b", headers=headers), 415)
        assert error["message"] == "the body has a content-encoding; send it uncompressed"


def test_states_count_as_what_an_answer_holds(models: dict[str, str]) -> None:
    pipeline = Pipeline.from_pretrained(models["story"])
    width = pipeline.num_details(pipeline.prepare("once", {"max_new_tokens": 4}, return_state=True))
    assert 8 <= width < 1000 and not pipeline.num_details(pipeline.prepare("once", {"max_new_tokens": 4}))
    body = {"inputs": ["once"] * 2, "max_new_tokens": 1, "return_state": True}
    with in_process({"story": pipeline}, limits={"details": 4 * width}) as server:
        assert (
            len(server.post("/v1/generate", {**body, "do_sample": True, "num_return_sequences": 2}).json()["results"])
            == 2
        )
        error = error_of(server.post("/v1/generate", {**body, "inputs": ["once"] * 5}), 400)
        assert (error["param"], error["code"]) == ("return_state", "limit_exceeded")
        assert error["message"].endswith("send fewer inputs")


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


def test_the_page_of_documentation_loads_nothing_from_elsewhere(server: InProcess) -> None:
    page = server.request("GET", "/docs")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(addresses) >= 2 and all(address.startswith("/") for address in addresses)
    assert all(server.request("GET", address).status_code == 200 for address in addresses)


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


KEY = "correct-horse-battery-staple"


def test_every_route_but_health_needs_the_key() -> None:
    with in_process(keys=(api_key("another key, long enough"), api_key(KEY))) as server:
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


def test_a_long_answer_is_put_into_words_in_a_thread(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    pipeline = server.pipelines["en-de"]
    render = pipeline.render

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return render(*given)

    monkeypatch.setattr(pipeline, "render", noted)
    body = {"inputs": ["a b c"] * 5}
    whole = server.post("/v1/translate", body).json()
    monkeypatch.setattr("serving.service.LONG", 14)  # of 15 words
    assert server.post("/v1/translate", body).json() == whole
    assert events_of(server.post("/v1/translate", {**body, "stream": True}))[-1] == ("answer", whole)
    assert not any(name.startswith("prepare") for name in threads[:5])
    assert all(name.startswith("prepare") for name in threads[5:]) and len(threads) == 15


@pytest.mark.parametrize(
    "data",
    [
        {}, [], {"a": []}, "é\"", 1.5, None, [1, 2], [{}],
        {"b": [{"c": [[1], [2], [3]], "d": {"e": "f"}}, {}], "g": [{"h": 1}]},
        {"many": list(range(10)), "lists": [[{"token": "a", "logprob": -0.5}] * 2] * 9},
    ],
)  # fmt: skip
def test_json_in_parts_is_the_same_json(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.PART", 4)
    assert as_long_json(data) == as_json(data)


def test_no_part_of_long_json_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    step = [{"token": "a", "logprob": -0.5}] * 20
    sequence = {
        "tokens": ["a"] * 4000,
        "top_logprobs": [step] * 1000,
        "attentions": [[0.25] * 500] * 250,
        "state": "a" * 10**5,
    }
    tags = [{"label": "a", "score": 0.5, "start": 1, "end": 2, "text": "a"}] * 9999
    body = {"results": [{"sequences": []}, {"sequences": [sequence] * 2}, {"tags": tags}]}
    expected, longest = as_json(body), 0

    def noted(data: Any, write: Any = as_json) -> str:
        nonlocal longest
        longest = max(longest, len(text := write(data)))
        return str(text)

    monkeypatch.setattr("serving.http.as_json", noted)
    assert as_long_json(body) == expected and longest < 110_000


def test_every_request_is_told_of_without_what_it_said() -> None:
    seen: list[Exchange] = []
    models = Models(Runner(), lambda directories: FakePipeline("translate"))  # type: ignore[arg-type, return-value]
    models.apply(ModelSet(models={"en-de": "unused"}))
    app = build_app(models, Settings(), state_key=STATE_KEY, keys=[api_key(KEY, name="search")], observe=seen.append)
    with InProcess(app, models).running() as server:
        server.headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
        server.post("/v1/translate", {"inputs": "a secret"})
        server.post("/v1/translate", {"inputs": "a secret", "stream": True})
        server.post("/v1/translate", {"inputs": "poison", "stream": True})
        server.post("/v1/translate", {})
        server.get("/v1/made/up")
        server.pipelines["en-de"].failing_steps = 1
        server.post("/v1/translate", {"inputs": "a secret"})
        server.headers = {}
        server.post("/v1/translate", {"inputs": "a secret"})
    routes = [("/v1/translate", 200, None), ("/v1/translate", 200, None), ("/v1/translate", 200, "invalid_value"),
              ("/v1/translate", 400, "missing_field"), ("none", 404, "not_found"),
              ("/v1/translate", 500, "engine_error"), ("none", 401, "invalid_api_key")]  # fmt: skip
    assert [(one.route, one.status, one.code) for one in seen] == routes
    whole = seen[0]
    assert (whole.request_id, whole.key.name, whole.model, whole.revision) == (
        "mine",
        "search",
        "en-de",
        "0123456789ab",
    )
    assert seen[0].usage == seen[1].usage == {"input_tokens": 2, "output_tokens": 2}
    assert 0 < (whole.first_byte_s or 0) <= whole.seconds and len(seen[-1].request_id) == 32
    assert "secret" not in str(seen) and KEY not in str(seen)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("0af7651916cd43dd-8448:eb=+/_.1", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("é", False),
        ("a text that nobody may log", False), ('x"', False), ("x\t", False),
    ],
)  # fmt: skip
def test_a_request_id_is_taken_in_the_form_of_one(given: str, is_kept: bool) -> None:
    begun: list[Exchange] = []
    models = Models(Runner(), lambda directories: FakePipeline("translate"))  # type: ignore[arg-type, return-value]
    app = build_app(models, Settings(), state_key=STATE_KEY, begin=begun.append)
    with InProcess(app, models).running() as server:
        server.get("/healthz", headers=[(b"x-request-id", given.encode())])
    (told,) = begun
    assert told.request_id == given if is_kept else len(told.request_id) == 32


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (None, "localhost:8000", 200), (None, "127.0.0.1", 200), (None, "[::1]:8000", 200), (None, "evil.org", 421),
        (None, "127.0.0.1.evil.org", 421), (None, "", 421), (None, "localhost:x", 421),
        (["*.example.org", "example.org"], "API.example.org:443", 200), (["*.example.org"], "localhost", 421),
        (["example.org"], "example.org.evil.org", 421), (["Search.Example.org"], "search.example.ORG", 200),
        (["[::1]"], "[::1]:8000", 200), ([], "localhost", 421), ([], "", 421),
    ],
)  # fmt: skip
def test_only_known_names_of_the_host_are_answered(allowed: list[str] | None, host: str, status: int) -> None:
    with in_process(allowed_hosts=allowed) as server:
        response = server.get("/v1/models", headers={"host": host})
        assert response.status_code == status
        if status != 200:
            assert error_of(response, 421)["code"] == "host_not_allowed"
        assert server.get("/healthz", headers={"host": host}).status_code == 200


def test_any_name_elsewhere_than_on_loopback() -> None:
    with in_process(host="0.0.0.0") as server:
        assert server.get("/v1/models", headers={"host": "anything.org"}).status_code == 200


def test_pages_of_other_sites_are_kept_out_but_for_those_that_are_named() -> None:
    asking = {"origin": "https://ours.org", "access-control-request-method": "POST"}
    with in_process(cors_origins=["https://ours.org"], keys=(api_key(KEY),)) as server:
        granted = server.request("OPTIONS", "/v1/classify", headers=asking)
        assert granted.status_code == 200 and granted.headers["access-control-allow-origin"] == "https://ours.org"
        refused = server.request("OPTIONS", "/v1/classify", headers={**asking, "origin": "https://evil.org"})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        answer = server.post("/v1/classify", {"inputs": "x"}, headers={"authorization": f"Bearer {KEY}", **asking})
        assert answer.headers["access-control-allow-origin"] == "https://ours.org"
        assert answer.headers["access-control-expose-headers"] == "retry-after, x-request-id"
    with in_process() as server:
        assert "access-control-allow-origin" not in server.get("/v1/models", headers=asking).headers


@pytest.mark.parametrize("keys", [(), (api_key(KEY),)])
def test_the_description_tells_of_headers_and_keys(keys: tuple[ApiKey, ...]) -> None:
    with in_process(keys=keys) as server:
        document = server.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    for path in ("/v1/classify", "/v1/completions", "/v1/batch"):
        assert {header["name"] for header in document["paths"][path]["post"]["parameters"]} == {
            "x-request-timeout-seconds",
            "x-request-priority",
        }
    assert ("securitySchemes" in document["components"]) == ("security" in document) == bool(keys)
