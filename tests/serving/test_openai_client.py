"""The real `openai` client against our service: what it sends is taken, what we answer it can read."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Completion

from .conftest import InProcess, api_key, in_process
from .fakes import FakePipeline

KEY = "a key that is long enough"
# Every parameter of the client, at the value that asks for nothing, or at one that we honour.
SENT: dict[str, Any] = {
    "model": "story",
    "prompt": "a b",
    "best_of": None,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": None,
    "max_tokens": 16,
    "n": 1,
    "presence_penalty": 0,
    "seed": 3,
    "stop": None,
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1,
    "top_p": 1,
    "user": "somebody",
}


def ask(server: InProcess, question: Callable[[AsyncOpenAI], Coroutine[Any, Any, Any]], key: str = KEY) -> Any:
    async def asked() -> Any:
        transport = httpx.ASGITransport(server.app)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key=key, http_client=http, max_retries=0) as client,
        ):
            return await question(client)

    return server.wait(asked())


def create(server: InProcess, key: str = KEY, **body: Any) -> Any:
    return ask(server, lambda client: client.completions.create(**{"model": "story", "prompt": "a b", **body}), key)


def streamed(server: InProcess, **body: Any) -> list[Completion]:
    async def chunks(client: AsyncOpenAI) -> list[Completion]:
        stream = await client.completions.create(**{"model": "story", "prompt": "a b", "stream": True, **body})
        return [chunk async for chunk in stream]

    found: list[Completion] = ask(server, chunks)
    return found


def test_every_parameter_is_known() -> None:
    known = set(inspect.signature(AsyncOpenAI(api_key=KEY).completions.create).parameters)
    assert known - {"extra_headers", "extra_query", "extra_body", "timeout"} == set(SENT)


@pytest.mark.parametrize("name", SENT)
def test_null_is_taken_wherever_the_client_may_send_it(server: InProcess, name: str) -> None:
    if name not in ("model", "prompt", "user", "stream"):
        assert create(server, **{**SENT, name: None}).choices[0].text == "A B"


def test_create(server: InProcess) -> None:
    assert create(server, **SENT).choices[0].text == "A B"
    answer = create(server, prompt=["a b", "c"], n=2, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["a bA B", "a bA B #1", "cC", "cC #1"]
    told = answer.choices[0].logprobs
    assert told.tokens == ["a", "b", "A", "B"] and told.token_logprobs == [-1.5, -1.5, -0.5, -0.5]
    assert told.text_offset == [0, 1, 3, 4] and told.top_logprobs[3] == {"likely 0": -0.1, "B": -0.5}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 11
    assert answer.system_fingerprint == "0123456789ab"
    assert create(server, extra_body={"top_k": 3, "unheard_of": True}).choices[0].finish_reason == "stop"


def test_stream(server: InProcess) -> None:
    *chunks, last = streamed(server, n=2, logprobs=0, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 5
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    pieces = [chunk.choices[0] for chunk in chunks]
    for index, text in enumerate(["A B", "A B #1"]):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == text
        assert mine[-1].finish_reason == "stop"
        assert [token for piece in mine if piece.logprobs for token in piece.logprobs.tokens or []] == text.split()


@pytest.mark.parametrize(
    ("body", "kind", "code", "param", "message"),
    [
        ({"n": 99}, openai.BadRequestError, "limit_exceeded", "n", "n is 99, but this server allows at most 16"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_value", "suffix", "suffix is not supported"),
        ({"prompt": [1, 2]}, openai.BadRequestError, "invalid_value", "prompt[0]", "should be a valid string"),
        ({"model": "mood"}, openai.BadRequestError, "wrong_task", "model", "another task"),
        ({"model": "gpt"}, openai.NotFoundError, "model_not_found", "model", "no model of that name"),
        ({"model": "en-de", "prompt": ""}, openai.UnprocessableEntityError, "empty", "prompt", "prompt is empty"),
        ({"prompt": "a" * 20_001}, openai.APIStatusError, "too_long", "prompt", "20001 characters"),
    ],
)
def test_errors_of_a_request(
    server: InProcess, body: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str, message: str
) -> None:
    for asked in ({}, {"stream": True}):
        with pytest.raises(kind) as raised:
            create(server, **body, **asked)
        assert type(raised.value) is kind
        assert (raised.value.code, raised.value.param) == (code, param) and message in str(raised.value)
        assert raised.value.type == "invalid_request_error"


def test_a_key_that_is_missing_or_unknown() -> None:
    with in_process(keys=(api_key(KEY),)) as server:
        assert create(server).choices[0].text == "A B"
        with pytest.raises(openai.AuthenticationError) as raised:
            create(server, key="another key of some length")
        assert raised.value.code == "invalid_api_key" and "Authorization: Bearer" in str(raised.value)
        with pytest.raises(openai.AuthenticationError):
            ask(server, lambda client: client.models.list(), key="another key of some length")


def test_a_full_queue_and_a_deadline() -> None:
    with in_process({"story": FakePipeline("generate")}, max_requests=1, limits={"inputs": 1}) as server:
        server.pipelines["story"].gate.clear()
        body = {"model": "story", "prompt": "a"}
        waiting = asyncio.run_coroutine_threadsafe(server.send("POST", "/v1/completions", json=body), server.loop)
        while not server.runner.num_open:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as raised:
            create(server)
        assert raised.value.code == "queue_full" and raised.value.response.headers["retry-after"] == "1"
        server.pipelines["story"].gate.set()
        assert waiting.result(60).status_code == 200
        server.pipelines["story"].step_s = 0.2
        with pytest.raises(openai.APIStatusError) as late:
            create(server, extra_headers={"x-request-timeout-seconds": "0.3"})
        assert late.value.status_code == 408 and late.value.code == "deadline_passed"


def test_a_fault_of_the_server() -> None:
    with in_process({"story": FakePipeline("generate", failing_steps=1)}) as server:
        with pytest.raises(openai.InternalServerError) as raised:
            create(server)
        assert raised.value.code == "engine_error" and "secret" not in str(raised.value)
        assert create(server).choices[0].text == "A B"


def test_a_stream_that_breaks_off(server: InProcess) -> None:
    with pytest.raises(openai.APIError) as raised:
        streamed(server, prompt="a poison")
    assert raised.value.message == "poison" and raised.value.param == "inputs"


def test_models(server: InProcess) -> None:
    listed = ask(server, lambda client: client.models.list())
    assert [model.id for model in listed.data] == list(server.pipelines)
    one = ask(server, lambda client: client.models.retrieve("story"))
    assert one == listed.data[list(server.pipelines).index("story")]
    assert one.object == "model" and one.owned_by == "local" and one.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError) as raised:
        ask(server, lambda client: client.models.retrieve("gpt"))
    assert raised.value.code == "model_not_found" and raised.value.param == "model"
    with pytest.raises(openai.NotFoundError) as nowhere:
        ask(server, lambda client: client.embeddings.create(model="story", input="a"))
    assert nowhere.value.code == "not_found"
