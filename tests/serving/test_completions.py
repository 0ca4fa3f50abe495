"""/v1/completions: OpenAI's shapes, defaults and refusals; then, of a small real model, that what it tells is true."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from seqmodels.pipeline import Pipeline

from .conftest import InProcess, error_of, events_of, in_process

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chunks_of(server: InProcess, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = events_of(server.post("/v1/completions", {**body, "stream": True}))
    assert events[-1] == (None, "[DONE]") and len({chunk["id"] for _, chunk in events[:-1]}) == 1
    return [chunk for _, chunk in events[:-1]]


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that a stream's chunks come to, one choice a chunk."""
    choices: dict[int, dict[str, Any]] = {}
    for (piece,) in (chunk["choices"] for chunk in chunks):
        empty = {"index": piece["index"], "text": "", "logprobs": None, "finish_reason": None}
        choice = choices.setdefault(piece["index"], empty)
        assert choice["finish_reason"] is None, "nothing comes after the end"
        choice["text"] += piece["text"]
        choice["finish_reason"] = piece["finish_reason"]
        if piece["logprobs"] is not None:
            told, new = choice["logprobs"] or {}, piece["logprobs"]
            choice["logprobs"] = {name: None if new[name] is None else told.get(name, []) + new[name] for name in LISTS}
    return [choices[index] for index in sorted(choices)]


# -- shapes


def test_completion_in_openai_shape(server: InProcess) -> None:
    body = {"model": "story", "prompt": ["a b", "c"], "n": 2, "max_tokens": 9, "seed": 1, "logprobs": 0, "user": "me"}
    answer = server.post("/v1/completions", body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "A B"), (1, "A B #1"), (2, "C"), (3, "C #1"),
    ]  # fmt: skip
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][1]["logprobs"] == {
        "tokens": ["A", "B", "#1"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": None,
        "text_offset": [0, 1, 3],
    }
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


def test_completion_stream(server: InProcess) -> None:
    body = {"model": "en-de", "prompt": ["a b", "c"], "n": 2, "max_tokens": 2}
    *chunks, last = chunks_of(server, {**body, "stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    choices = joined(chunks)
    assert [choice["text"] for choice in choices] == ["A B", "A B #1", "C", "C #1"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length", "stop", "length"]
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks_of(server, body))  # it was not asked for


def test_completion_defaults_and_greedy(server: InProcess) -> None:
    text = " ".join("abcdefghijklmnopqrst")
    (choice,) = server.post("/v1/completions", {"model": "story", "prompt": text, "temperature": 0}).json()["choices"]
    assert choice["text"] == text[:31].upper() and choice["finish_reason"] == "length"  # 16 tokens


def test_what_openai_allows_of_temperature_and_seed(server: InProcess) -> None:
    body = {"model": "story", "prompt": "a b", "temperature": 1e-5, "seed": -1}
    assert server.post("/v1/completions", body).status_code == 200
    params = server.pipelines["story"].submitted[-1].params
    assert (params["temperature"], params["seed"], params["do_sample"]) == (0.001, 2**63 - 1, True)


def test_one_greedy_search_is_all_the_choices(server: InProcess) -> None:
    body = {"model": "story", "prompt": ["a b", "c"], "n": 3, "best_of": 5, "temperature": 0, "logprobs": 1}
    before = len(server.pipelines["story"].submitted)
    answer = server.post("/v1/completions", body).json()
    jobs = server.pipelines["story"].submitted[before:]
    assert [job.params["num_return_sequences"] for job in jobs] == [1, 1]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "A B"), (1, "A B"), (2, "A B"), (3, "C"), (4, "C"), (5, "C"),
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    del body["best_of"]
    assert joined(chunks_of(server, body)) == answer["choices"]


def test_the_likeliest_tokens_and_the_chosen_one(server: InProcess) -> None:
    body = {"model": "story", "prompt": "a b", "logprobs": 2}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [
        {"likely 0": -0.1, "likely 1": -0.2, "A": -0.5},
        {"likely 0": -0.1, "likely 1": -0.2, "B": -0.5},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: InProcess, stream: bool) -> None:
    """As it was sent: no tokenizer writes such blanks."""
    body = {"model": "story", "prompt": [" a  b", "c"], "n": 2, "echo": True, "stream": stream}
    if stream:
        chunks = chunks_of(server, body)
        choices = joined(chunks)
        assert [chunk["choices"][0]["text"] for chunk in chunks[:4]] == [" a  b", " a  b", "c", "c"]
    else:
        answer = server.post("/v1/completions", body).json()
        choices = answer["choices"]
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert [choice["text"] for choice in choices] == [" a  bA B", " a  bA B #1", "cC", "cC #1"]
    assert all(choice["logprobs"] is None for choice in choices)


def test_echo_with_logprobs(server: InProcess) -> None:
    body = {"model": "story", "prompt": ["a b", "c"], "echo": True, "logprobs": 1}
    answer = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "a bA B"
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "A", "B"],
        "token_logprobs": [-1.5, -1.5, -0.5, -0.5],
        "top_logprobs": [{"likely 0": -0.1, token: -1.5 if token.islower() else -0.5} for token in "abAB"],
        "text_offset": [0, 1, 3, 4],
    }
    assert answer["choices"][1]["logprobs"]["tokens"] == ["c", "C"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert joined(chunks_of(server, body)) == answer["choices"]


@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_the_prompt_alone(server: InProcess, logprobs: int | None) -> None:
    body = {"model": "story", "prompt": ["a b", "c"], "n": 2, "echo": True, "max_tokens": 0, "logprobs": logprobs}
    answer = server.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a b", "a b", "c", "c"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    if logprobs is None:
        assert all(choice["logprobs"] is None for choice in answer["choices"])
    else:
        assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["a", "b"]] * 2 + [["c"]] * 2
    *chunks, last = chunks_of(server, {**body, "stream_options": {"include_usage": True}})
    assert joined(chunks) == answer["choices"] and last["usage"] == answer["usage"]


# -- refusals


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("suffix", "x", {}), ("presence_penalty", 0.5, {}), ("frequency_penalty", -1, {}),
        ("logit_bias", {"50256": -100}, {}), ("best_of", 3, {"stream": True}),
        ("echo", True, {"model": "en-de"}), ("echo", True, {"model": "describe"}),
    ],
)  # fmt: skip
def test_completion_refuses_by_name_what_it_cannot_do(
    server: InProcess, field: str, value: Any, others: dict[str, Any]
) -> None:
    body = {"model": "story", "prompt": "a", field: value, **others}
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["param"] == field and error["code"] == "unsupported_value"


def test_openais_number_of_tokens_gives_way_to_the_limit_where_none_is_asked_for() -> None:
    with in_process(limits={"max_new_tokens": 2}) as server:
        body = {"model": "story", "prompt": "a b c d"}
        for unsaid in ({}, {"max_tokens": None}):
            assert server.post("/v1/completions", {**body, **unsaid}).json()["usage"]["completion_tokens"] == 2
        assert error_of(server.post("/v1/completions", {**body, "max_tokens": 16}), 400)["code"] == "limit_exceeded"


@pytest.mark.parametrize(
    ("field", "value", "others", "code"),
    [
        ("best_of", 1, {"n": 2}, "invalid_value"),
        ("best_of", 17, {}, "limit_exceeded"),
        ("best_of", 17, {"temperature": 0}, "limit_exceeded"),
        ("n", 17, {}, "limit_exceeded"),
        ("n", 10**30, {"temperature": 0}, "limit_exceeded"),
        ("n", 10**30, {"best_of": 1}, "invalid_value"),
        ("max_tokens", 0, {}, "invalid_value"),
        ("max_tokens", 513, {}, "limit_exceeded"),
        ("logprobs", 21, {}, "invalid_value"),
    ],
)
def test_what_is_out_of_bounds(server: InProcess, field: str, value: int, others: dict[str, Any], code: str) -> None:
    body = {"model": "story", "prompt": "a", field: value, **others}
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["code"] == code and len(error["message"]) < 200
    assert error["param"] == ("best_of" if "best_of" in others else field)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"logprobs": 5, "temperature": 0, "n": 1}, 200, None),
        ({"logprobs": 5, "temperature": 0, "n": 3}, 400, "logprobs"),
        ({"logprobs": 5, "echo": True, "max_tokens": 0}, 200, None),
        ({"logprobs": 5, "echo": True, "max_tokens": 0, "n": 3}, 400, "logprobs"),
        ({"logprobs": 5, "echo": True}, 400, "logprobs"),
        ({"echo": True, "n": 2}, 200, None),
        ({"echo": True, "n": 16, "prompt": "e f g h i j k l m n"}, 413, "echo"),
        ({"prompt": ["a", "b"], "echo": True}, 200, None),
        ({"prompt": ["a", "b"], "echo": True, "logprobs": 0}, 413, "prompt"),
    ],
)
def test_answers_that_would_be_too_large(body: dict[str, Any], status: int, param: str | None) -> None:
    limits = {"details": 35, "inputs": 2, "body_bytes": 200}
    with in_process(limits=limits) as small:
        response = small.post("/v1/completions", {"model": "story", "prompt": "e f g", **body})
        assert response.status_code == status, response.text
        if param:
            assert error_of(response, status)["param"] == param
        assert small.runner.num_open == 0


def test_completion_accepts_neutral_and_unknown_fields(server: InProcess) -> None:
    neutral: dict[str, Any] = {
        "suffix": None,
        "echo": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "stream_options": None,
    }
    body = {"model": "story", "prompt": "a", "best_of": 1, "some_new_field": [1], **neutral}
    assert server.post("/v1/completions", body).status_code == 200


def test_whoever_is_refused_leaves_nothing_behind() -> None:
    """Of the two calls of one request the first is accepted, the second not."""
    with in_process(max_requests=3, limits={"inputs": 3}) as busy:
        busy.pipelines["mood"].gate.clear()
        held = busy.send("POST", "/v1/classify", json={"inputs": ["a", "b"]})
        waiting = asyncio.run_coroutine_threadsafe(held, busy.loop)
        while busy.runner.num_open < 2:
            time.sleep(0.01)
        body = {"model": "story", "prompt": "a", "echo": True, "logprobs": 0}
        assert error_of(busy.post("/v1/completions", body), 429)["code"] == "queue_full"
        busy.pipelines["mood"].gate.set()
        assert waiting.result(60).status_code == 200
        while busy.runner.num_open:
            time.sleep(0.01)
        assert busy.pipelines["story"].steps == 0, "the first call was taken back"
        assert busy.post("/v1/completions", body).status_code == 200


# -- truth


@pytest.fixture(scope="module")
def real(models: dict[str, str]) -> Iterator[InProcess]:
    names = ("story", "en-de")
    with in_process({name: Pipeline.from_pretrained(models[name]) for name in names}) as running:
        yield running


PROMPT = "größer 日本, a 🙂."
SAMPLED = {"model": "story", "prompt": PROMPT, "max_tokens": 60, "seed": 5, "temperature": 1.3, "top_p": 0.95}


def complete(server: InProcess, **body: Any) -> list[dict[str, Any]]:
    response = server.post("/v1/completions", {**SAMPLED, **body})
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def test_the_log_probabilities_of_an_echo_are_those_of_score(real: InProcess) -> None:
    (score,) = real.post("/v1/score", {"model": "story", "targets": PROMPT}).json()["results"]
    assert score["tokens"][-1] == "<eos>" and len(score["tokens"]) > 20
    (alone,) = complete(real, echo=True, logprobs=3, max_tokens=0)
    assert alone["text"] == PROMPT
    assert alone["logprobs"]["tokens"] == score["tokens"][:-1]
    assert alone["logprobs"]["token_logprobs"] == score["logprobs"][:-1]
    assert alone["logprobs"]["text_offset"] == score["offsets"][:-1]
    at = [PROMPT[offset] for offset in alone["logprobs"]["text_offset"]]
    assert "".join(at) == "".join(character * len(character.encode()) for character in PROMPT)
    (plain,) = complete(real, logprobs=3)
    (whole,) = complete(real, echo=True, logprobs=3)
    assert whole["text"] == PROMPT + plain["text"]
    shifted = {**plain["logprobs"], "text_offset": [len(PROMPT) + x for x in plain["logprobs"]["text_offset"]]}
    assert whole["logprobs"] == {name: alone["logprobs"][name] + shifted[name] for name in LISTS}


def test_the_likeliest_tokens_of_an_echo_are_what_a_search_would_find(real: InProcess) -> None:
    (alone,) = complete(real, prompt="abc", echo=True, logprobs=4, max_tokens=0)
    for cut, told in enumerate(alone["logprobs"]["top_logprobs"]):
        body = {"model": "story", "inputs": "abc"[:cut], "max_new_tokens": 1, "top_logprobs": 4}
        (result,) = real.post("/v1/generate", body).json()["results"]
        found = {one["token"]: one["logprob"] for one in result["sequences"][0]["top_logprobs"][0]}
        assert list(told)[:4] == list(found)
        assert list(told.values())[:4] == pytest.approx(list(found.values()), abs=1e-5)
        assert told["abc"[cut]] == alone["logprobs"]["token_logprobs"][cut] and len(told) <= 5


def test_log_probabilities_are_those_of_generate(real: InProcess) -> None:
    choices = complete(real, n=8, logprobs=3, max_tokens=200)
    body = {"model": "story", "inputs": PROMPT, "max_new_tokens": 200, "seed": 5, "temperature": 1.3, "top_p": 0.95}
    body |= {"do_sample": True, "num_return_sequences": 8, "top_logprobs": 3, "logprobs": True}
    sequences = real.post("/v1/generate", body).json()["results"][0]["sequences"]
    assert {choice["finish_reason"] for choice in choices} == {"stop", "length"}, "some end with EOS"
    for choice, sequence in zip(choices, sequences, strict=True):
        told = choice["logprobs"]
        assert choice["text"] == sequence["text"] and told["tokens"] == sequence["tokens"]
        assert told["token_logprobs"] == sequence["logprobs"] and told["text_offset"] == sequence["offsets"]
        for step, likeliest, token, nats in zip(
            told["top_logprobs"], sequence["top_logprobs"], told["tokens"], told["token_logprobs"], strict=True
        ):
            assert step == {one["token"]: one["logprob"] for one in likeliest} | {token: nats}


def test_best_of_is_the_best_of_as_many_samples(real: InProcess) -> None:
    def per_token(choice: dict[str, Any]) -> float:
        nats: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(nats) / len(nats)

    candidates = complete(real, n=12, logprobs=1)
    best = sorted(candidates, key=per_token, reverse=True)[:3]
    assert best != candidates[:3]
    found = real.post("/v1/completions", {**SAMPLED, "n": 3, "best_of": 12, "logprobs": 1}).json()
    assert [{**choice, "index": 0} for choice in found["choices"]] == [{**choice, "index": 0} for choice in best]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["completion_tokens"] == sum(len(choice["logprobs"]["tokens"]) for choice in candidates)
    assert complete(real, n=12, best_of=12, logprobs=1) == candidates


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_stream_comes_to_the_same(real: InProcess, echo: bool, logprobs: int | None) -> None:
    """Also with stop strings of characters that the model wrote before, so that some is held back in vain."""
    options = {"echo": echo, "logprobs": logprobs, "n": 6, "prompt": [PROMPT, "abc"]}
    text = complete(real)[0]["text"]
    at = next(i for i in range(10, len(text) - 3) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 3])
    for stop in (None, [text[at : at + 3], text[at] + "x"]):
        whole = complete(real, **options, stop=stop)
        assert joined(chunks_of(real, {**SAMPLED, **options, "stop": stop})) == whole
        for choice in whole if logprobs is not None else []:
            offsets = choice["logprobs"]["text_offset"]
            assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
            for offset, token in zip(offsets, choice["logprobs"]["tokens"], strict=True):
                if token.isascii() and len(token) == 1 and offset < len(choice["text"]):
                    # Before it may stand bytes that no character came of; all of it may be cut off.
                    rest = choice["text"][offset:].lstrip("\N{REPLACEMENT CHARACTER}")
                    assert not rest or rest[0] == token
    assert whole[0]["finish_reason"] == "stop"


def test_greedy_choices_are_one_greedy_answer(real: InProcess) -> None:
    greedy = {"temperature": 0, "top_p": None, "seed": None, "model": "en-de"}
    choices = complete(real, **greedy, n=3, logprobs=0)
    (one,) = complete(real, **greedy, logprobs=0)
    assert choices == [{**one, "index": index} for index in range(3)]


def test_nothing_to_echo(real: InProcess) -> None:
    for prompt in (None, ""):
        (alone,) = complete(real, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
        empty: list[Any] = []
        assert alone["text"] == "" and alone["logprobs"] == dict.fromkeys(LISTS, empty)
        assert complete(real, prompt=prompt, echo=True, logprobs=1) == complete(real, prompt=prompt, logprobs=1)
