"""Both clients, over real sockets: against the app, and against servers that break in every way."""

import asyncio
import contextlib
import inspect
import json
import math
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from seqmodels.errors import InputError
from serving import questions
from serving.client import AsyncClient, Client, ServiceError
from serving.schema import ClassifyResponse, GenerateResponse

from .conftest import InProcess, api_key, in_process
from .fakes import FakePipeline, png

KEY = "0123456789abcdef"


class Driven:
    """The asynchronous client as if it were the other one, so that one suite is for both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> "Driven":
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._client.__aexit__(None, None, None))
        self._runner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            asked = getattr(self._client, name)(*arguments, **options)
            return self._runner.run(asked) if inspect.iscoroutine(asked) else self._parts(asked)

        return call

    def _parts(self, asked: Any) -> Iterator[Any]:
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._runner.run(anext(asked))
        finally:
            self._runner.run(asked.aclose())


@pytest.fixture(params=[Client, Driven], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextlib.contextmanager
def over_http(server: InProcess) -> Iterator[str]:
    """The address of an app, on the loop on which it runs."""
    listening = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.app, lifespan="off", log_level="warning"))
    serving = asyncio.run_coroutine_threadsafe(web.serve([listening]), server.loop)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        web.should_exit = True
        serving.result(30)


@pytest.fixture(scope="module")
def address(server: InProcess) -> Iterator[str]:
    with over_http(server) as url:
        yield url


@pytest.fixture
def client(kind: Any, address: str) -> Iterator[Any]:
    with kind(address) as client:
        yield client


class Scripted:
    """A server that gives each connection the next of some answers, then closes it; refuses when none is left."""

    def __init__(self, *answers: bytes | float) -> None:
        """A number is a time to wait, with no answer."""
        self.asked: list[Any] = []  # the headers of each request
        self.bodies: list[bytes] = []
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as reading:
                reading.readline()
                head = b"".join(iter(reading.readline, b"\r\n"))
                self.asked.append(BytesHeaderParser().parsebytes(head))
                self.bodies.append(reading.read(int(self.asked[-1]["content-length"] or 0)))
                if isinstance(answer, bytes):
                    connection.sendall(answer)
                else:
                    time.sleep(answer)
        self._socket.close()

    @property
    def ids(self) -> list[str]:
        return [headers["x-request-id"] for headers in self.asked]


def answer_of(body: Any, status: int = 200, cut: int = 0, **headers: Any) -> bytes:
    """An HTTP answer, the last `cut` bytes of which never come."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content_length": len(content), "connection": "close", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
    whole = f"HTTP/1.1 {status} Some\r\n{lines}\r\n".encode() + content
    return whole[: len(whole) - cut]


def refusal(code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": f"about {code}", "type": "server_error", "param": param, "code": code}}


GOOD: dict[str, Any] = {
    "model": "m", "revision": "r", "usage": {"input_tokens": 1, "output_tokens": 1},
    "results": [{"label": "yes", "score": 0.9, "scores": {"yes": 0.9, "no": 0.1}}],
}  # fmt: skip
FINE = answer_of(GOOD)
DIED = answer_of(b"Internal Server Error", 500)  # what comes through Ray's proxy when the replica dies
CLOSED = b""


def events(*events: tuple[str, Any]) -> bytes:
    return b"".join(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode() for name, data in events)


DELTA = ("delta", {"index": 0, "sequence": 0, "delta": "A"})


def test_every_method_answers_what_the_service_answers(client: Any, server: InProcess) -> None:
    def told(path: str, **body: Any) -> Any:
        return server.post(f"/v1/{path}", body).json()

    def plain(answer: Any) -> Any:
        return answer.model_dump(exclude_none=True)

    assert isinstance(client.classify(["good", "bad"]), ClassifyResponse)
    assert plain(client.classify(["good", "bad"])) == told("classify", inputs=["good", "bad"])
    assert plain(client.tag({"words": ["a", "b"]})) == told("tag", inputs={"words": ["a", "b"]})
    assert plain(client.translate("a b", num_beams=2, num_return_sequences=2)) == told(
        "translate", inputs="a b", num_beams=2, num_return_sequences=2
    )
    assert client.caption(png(7, 9)).results[0].sequences[0].text == "PICTURE 7 BY 9"
    assert client.caption([{"image": png(7, 9)}]).results[0].sequences[0].text == "PICTURE 7 BY 9"
    assert client.generate().results[0].sequences[0].text == "FREELY"
    assert plain(client.generate("on", do_sample=True, seed=7)) == told("generate", inputs="on", do_sample=True, seed=7)
    assert plain(client.score(["x"], ["a"], model="en-de")) == told("score", targets=["x"], inputs=["a"], model="en-de")
    assert [card.model_dump() for card in client.models()] == server.get("/v1/models").json()["data"]
    assert client.is_ready() is True


def test_a_stream_gives_its_text_in_parts(kind: Any) -> None:
    slow = {"en-de": FakePipeline("translate", step_s=0.02)}
    with in_process(slow, stream_interval_s=0.0) as server, over_http(server) as url, kind(url) as client:
        parts = list(client.stream("translate", ["a b", "c"], num_beams=2, num_return_sequences=2))
    texts = {place: "".join(part.text for part in parts if part[:2] == place) for place in [(0, 0), (0, 1), (1, 0)]}
    assert texts == {(0, 0): "A B", (0, 1): "A B #1", (1, 0): "C"} and len(parts) > 4


def test_a_stream_that_is_left_frees_its_rows(client: Any, server: InProcess) -> None:
    pipeline = server.pipelines["en-de"]
    pipeline.step_s = 0.02
    stream = client.stream("translate", "a " * 30)
    next(stream)
    stream.close()
    limit = time.monotonic() + 0.4
    while pipeline.live:
        assert time.monotonic() < limit
        time.sleep(0.005)
    pipeline.step_s = 0.0


def test_ends_of_lines_that_only_unicode_knows_do_not_cut_a_stream(client: Any) -> None:
    text = "a\u2028b\x85c"
    parts = client.stream("translate", {"words": [text]})
    assert "".join(part.text for part in parts) == " ".join(text.upper().split())
    data = json.dumps({"index": 0, "sequence": 0, "delta": text}, ensure_ascii=False)
    reader = questions.stream("translate", "x").__next__().reader()
    chunk = f"event: delta\ndata: {data}\n\n".encode()
    parts = [part for i in range(len(chunk)) for part in reader.push(chunk[i : i + 1])]  # byte by byte
    assert parts == [(0, 0, text)]


def test_a_batch_of_a_thousand_and_more_is_in_order(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As several HTTP requests; those that fail are told in their places."""
    monkeypatch.setattr(questions, "BATCH_LINES", 400)
    taken = 0

    def requests() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield ("translate", {"inputs": "" if i % 100 == 50 else f"word {i}"})

    answers = client.batch(requests())
    first = next(answers)
    assert taken <= 401 and first.results[0].sequences[0].text == "WORD 0"
    rest = list(answers)
    assert len(rest) == 999
    for i, answer in enumerate(rest, 1):
        if i % 100 == 50:
            assert (answer.status, answer.code, answer.param) == (422, "empty", "inputs")
            assert answer.request_id.endswith(f"-{i % 400 + 1}")
        else:
            assert isinstance(answer, GenerateResponse) and answer.results[0].sequences[0].text == f"WORD {i}"


def test_a_batch_has_answers_of_many_kinds(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "BATCH_BYTES", 100)  # each goes alone, the picture too
    asked = [("classify", {"inputs": "good"}), ("score", {"targets": "a", "model": "story"}),
             ("caption", {"inputs": png()}), ("tag", {"inputs": "a", "nonsense": 1})]  # fmt: skip
    kinds = [type(answer).__name__ for answer in client.batch(asked)]
    assert kinds == ["ClassifyResponse", "ScoreResponse", "GenerateResponse", "ServiceError"]
    assert list(client.batch([])) == []
    with pytest.raises(InputError, match="task of a request is sing, but it must be one of classify"):
        list(client.batch([("sing", {})]))


def test_a_batch_that_ends_early_raises(kind: Any) -> None:
    line = json.dumps({"custom_id": None, "error": None,
                       "response": {"status_code": 200, "request_id": "x-1", "body": GOOD}}) + "\n"  # fmt: skip
    ended = {"custom_id": None, "response": None, "error": {"code": "deadline_passed", "message": "too long"}}
    two = [("classify", {"inputs": "a"})] * 2
    for content, code in ((line, "interrupted"), (line + json.dumps(ended) + "\n", "deadline_passed")):
        broken = Scripted(answer_of(content.encode()), FINE)
        with kind(broken.url) as client:
            answers = client.batch(two)
            assert next(answers).results[0].label == "yes"
            with pytest.raises(ServiceError) as caught:
                next(answers)
        assert caught.value.code == code and len(broken.asked) == 1
        assert broken.asked[0]["x-request-timeout-seconds"] == "3600.000"  # Ray's proxy would end it sooner


def test_errors_of_the_service_are_told_in_full(client: Any) -> None:
    with pytest.raises(ServiceError, match="num_beams is 64, but this server allows at most 16") as caught:
        client.translate("x", num_beams=64)
    error = caught.value
    assert (error.status, error.code, error.param, error.retry_after_s) == (400, "limit_exceeded", "num_beams", None)
    assert len(error.request_id) == 32
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
    with pytest.raises(ServiceError) as caught:
        list(client.stream("translate", ["a", ""]))
    assert (caught.value.status, caught.value.param) == (422, "inputs[1]")
    with pytest.raises(ServiceError) as caught:
        list(client.stream("translate", "poison"))
    assert (caught.value.status, caught.value.code, caught.value.param) == (0, "invalid_value", "inputs")
    assert caught.value.request_id


def test_what_cannot_be_written_as_json_is_not_sent(client: Any) -> None:
    for wrong in ({1, 2}, {"features": [[float("nan")]]}, "\ud800"):
        with pytest.raises(InputError, match="cannot be written as JSON"):
            client.classify(wrong)


def test_a_key_a_priority_and_a_time_go_along(kind: Any) -> None:
    with in_process(keys=(api_key(KEY, priority="normal"),)) as server, over_http(server) as url:
        with kind(url) as stranger, pytest.raises(ServiceError) as caught:
            stranger.classify("x")
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        with kind(url, KEY, priority="high") as client:
            with pytest.raises(ServiceError) as caught:
                client.classify("x")
            assert (caught.value.status, caught.value.code) == (403, "priority_not_allowed")
            assert client.classify("x", priority="low").results[0].label == "no"
            assert len(list(client.batch([("classify", {"inputs": "x"})], priority="low"))) == 1
            assert list(client.stream("translate", "x", priority="low"))
        server.pipelines["en-de"].step_s = 0.05
        with kind(url, KEY, timeout_s=0.5) as hasty:
            for timeout_s in (None, 0.3):
                options = {} if timeout_s is None else {"timeout_s": timeout_s}
                with pytest.raises(ServiceError) as caught:
                    hasty.translate("a " * 30, **options)
                assert (caught.value.status, caught.value.code) == (408, "deadline_passed")
            assert hasty.translate("a " * 20, timeout_s=5).results


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (CLOSED, "closed"), (DIED, "died"), (b"HTTP/1.1 200 OK\r\ncontent-le", "in the head"),
        (answer_of(GOOD, cut=len(json.dumps(GOOD))), "before the body"),
        (answer_of(b"<html>", 502), "a proxy"), (answer_of(b"no replica", 503), "none left"),
        (answer_of(refusal("shutting_down"), 503, retry_after=0), "leaving"),
        (answer_of(b"Path '/v1/classify' not found. Ping ...", 404), "Ray has forgotten it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_replica_that_died_is_asked_again_once(kind: Any, first: bytes, why: str) -> None:
    server = Scripted(first, FINE)
    with kind(server.url) as client:
        assert client.classify("x").results[0].label == "yes"
    assert len(server.asked) == 2 and server.ids[0] == server.ids[1] and len(server.ids[0]) == 32
    assert server.bodies[0] == server.bodies[1] == b'{"inputs": "x"}'
    times = [float(headers["x-request-timeout-seconds"]) for headers in server.asked]
    assert 69 < times[1] < times[0] <= 70  # what is left of it


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"api_key": "schl\xfcssel"}, "api_key"), ({"api_key": "one\ntwo"}, "api_key"), ({"api_key": " \n"}, "api_key"),
        ({"priority": "h\xefgh"}, "priority"), ({"url": "http://127.0.0.1:abc"}, "url"),
        ({"timeout_s": math.inf}, "timeout_s"), ({"timeout_s": math.nan}, "timeout_s"),
        ({"timeout_s": "3"}, "timeout_s"), ({"timeout_s": 0}, "timeout_s"),
    ],
)  # fmt: skip
def test_what_no_request_can_hold_is_refused_without_telling_it(kind: Any, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as refused:
        kind(**given)
    assert refused.value.param == param and "schl" not in str(refused.value)
    if param in ("timeout_s", "priority"):
        with kind() as client, pytest.raises(InputError, match=param):
            client.classify("x", **given)


def test_a_key_of_a_file_has_no_end_of_line(kind: Any) -> None:
    server = Scripted(FINE)
    with kind(server.url, api_key="a-key-of-a-file\n") as client:
        client.classify("x")
    assert server.asked[0]["authorization"] == "Bearer a-key-of-a-file"


@pytest.mark.parametrize("twice", [CLOSED, DIED, answer_of(refusal("shutting_down"), 503, retry_after=0)])
def test_a_second_death_is_told(kind: Any, twice: bytes) -> None:
    server = Scripted(twice, twice, FINE)
    with kind(server.url) as client, pytest.raises(ServiceError) as caught:
        client.classify("x")
    assert len(server.asked) == 2 and caught.value.request_id == server.ids[0] == server.ids[1]
    expected = {CLOSED: (0, "unreachable"), DIED: (500, "unknown")}.get(twice, (503, "shutting_down"))
    assert (caught.value.status, caught.value.code) == expected
    assert caught.value.__suppress_context__  # no traceback of httpx's
    assert server.url in str(caught.value) or expected[1] == "shutting_down"


@pytest.mark.parametrize(
    ("answer", "status", "code", "retry_after_s"),
    [
        (answer_of(refusal("queue_full"), 429, retry_after=7), 429, "queue_full", 7.0),
        (answer_of(refusal("deadline_passed"), 408), 408, "deadline_passed", None),
        (answer_of(refusal("engine_error"), 500), 500, "engine_error", None),
        (answer_of(refusal("invalid_value", "inputs"), 400), 400, "invalid_value", None),
        (answer_of(b"Request dropped due to backpressure (...)", 503, retry_after=1), 503, "queue_full", 1.0),
        (answer_of(b"<html>", 404, retry_after="soon"), 404, "unknown", None),
        (answer_of(GOOD, cut=5), 0, "interrupted", None),  # after the first byte
        (answer_of(b"<html>welcome</html>"), 200, "unreadable", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_all_else_is_asked_once(kind: Any, answer: bytes, status: int, code: str, retry_after_s: float | None) -> None:
    server = Scripted(answer, FINE)
    with kind(server.url) as client, pytest.raises(ServiceError) as caught:
        client.classify("x")
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (status, code, retry_after_s)
    assert error.request_id == server.ids[0] and len(server.asked) == 1
    assert error.param == ("inputs" if code == "invalid_value" else None)


def test_a_stream_is_begun_anew_only_before_its_first_text(kind: Any) -> None:
    whole = answer_of(events(DELTA, ("answer", GOOD)))
    server = Scripted(answer_of(b"", content_length=100), whole)  # a head, and no event
    with kind(server.url) as client:
        assert [part.text for part in client.stream("translate", "a")] == ["A"]
    assert len(server.asked) == 2 and server.ids[0] == server.ids[1]
    for broken in (answer_of(events(DELTA), content_length=1000), answer_of(events(DELTA))):
        server = Scripted(broken, whole)
        with kind(server.url) as client:
            stream = client.stream("translate", "a")
            assert next(stream).text == "A"
            with pytest.raises(ServiceError, match="broke off") as caught:
                next(stream)
        assert (caught.value.status, caught.value.code) == (0, "interrupted")
        assert len(server.asked) == 1 and caught.value.request_id == server.ids[0]


def test_who_is_not_there_is_tried_twice_and_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    request = questions.Asking.request

    def counted(asking: Any) -> dict[str, Any]:
        sent = request(asking)
        tries.append(sent["headers"]["x-request-id"])
        return sent

    monkeypatch.setattr(questions.Asking, "request", counted)
    with socket.socket() as free:  # bound, and not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with kind(url) as client:
            assert client.is_ready() is False and len(tries) == 1
            for ask in (client.models, lambda: list(client.batch([("classify", {"inputs": "x"})]))):
                tries.clear()
                with pytest.raises(ServiceError, match=f"{url} gives no answer .*check the address") as caught:
                    ask()
                assert (caught.value.status, caught.value.code) == (0, "unreachable")
                assert tries == [caught.value.request_id] * 2
    with kind("localhost:8000") as client, pytest.raises(ServiceError, match="such as http://") as caught:
        client.models()
    assert caught.value.code == "unreachable"


def test_a_service_that_says_nothing_is_not_asked_twice(kind: Any) -> None:
    server = Scripted(1.0, FINE)
    with kind(server.url, timeout_s=0.3) as client:
        with pytest.raises(ServiceError, match=r"gave no answer in 0.3 s; raise timeout_s") as caught:
            client.classify("x")
        assert (caught.value.status, caught.value.code) == (0, "timeout")
    assert len(server.asked) == 1 and caught.value.request_id == server.ids[0]


def test_a_pause_longer_than_the_time_left_is_not_made(kind: Any) -> None:
    server = Scripted(answer_of(refusal("shutting_down"), 503, retry_after=1), FINE)
    started_at = time.monotonic()
    with kind(server.url, timeout_s=0.8) as client, pytest.raises(ServiceError) as caught:
        client.classify("x")
    assert caught.value.code == "shutting_down" and time.monotonic() - started_at < 0.7 and len(server.asked) == 1
    server = Scripted(answer_of(refusal("shutting_down"), 503, retry_after=1), FINE)
    started_at = time.monotonic()
    with kind(server.url) as client:
        assert client.classify("x").results
    assert 1.0 <= time.monotonic() - started_at < 3  # as long as it was asked to wait


def test_not_ready_is_a_no(kind: Any) -> None:
    server = Scripted(answer_of({"ready": False}, 503), answer_of({"ready": True}))
    with kind(server.url) as client:
        assert client.is_ready() is False and len(server.asked) == 1
        assert client.is_ready() is True


def test_states_come_and_go_as_options(kind: Any) -> None:
    body = {**GOOD, "results": [{**GOOD["results"][0], "state": "abc", "state_exact": True}]}
    server = Scripted(answer_of(body))
    with kind(server.url) as client:
        (result,) = client.classify("x", state="before", return_state=True).results
    assert (result.state, result.state_exact) == ("abc", True)
    assert json.loads(server.bodies[0]) == {"inputs": "x", "state": "before", "return_state": True}


def test_one_asynchronous_client_asks_many_things_at_a_time(address: str) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(address) as client:
            answers = await asyncio.gather(*(client.translate(f"word {i}") for i in range(200)))
            return [answer.results[0].sequences[0].text for answer in answers]

    assert asyncio.run(ask()) == [f"WORD {i}" for i in range(200)]


def test_the_example_of_the_readme_runs(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```pycon\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    code = "".join(line[4:] for line in example.splitlines(keepends=True))
    (tmp_path / "reviews.txt").write_text("good\nbad\n")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out.count("label=") == 2
