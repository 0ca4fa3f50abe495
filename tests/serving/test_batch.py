"""/v1/batch: answers in order, each what its own request would get, while later lines are still being read."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from serving import batch

from .conftest import InProcess, api_key, error_of, in_process

KEY = "0123456789abcdef"
TYPE = {"content-type": "application/x-ndjson"}


def line(inputs: Any, custom_id: str | None = None, url: str = "/v1/translate", **options: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "url": url, "body": {"inputs": inputs, **options}}).encode() + b"\n"


def ask(server: InProcess, content: bytes, **headers: str) -> list[dict[str, Any]]:
    response = server.request("POST", "/v1/batch", content=content, headers={**TYPE, **headers})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(one) for one in response.text.splitlines()]


def test_each_line_gets_what_its_own_request_would_get(server: InProcess) -> None:
    bodies = [("/v1/translate", {"inputs": ["a b", "c"]}), ("/v1/classify", {"inputs": "good"}),
              ("/v1/tag", {"inputs": {"words": ["x", "y"]}}), ("/v1/generate", {"inputs": "on"}),
              ("/v1/score", {"targets": "a b", "model": "story"})]  # fmt: skip
    content = b"".join(
        json.dumps({"custom_id": f"{i}", "method": "POST", "url": url, "body": body, "more": 1}).encode() + b"\n"
        for i, (url, body) in enumerate(bodies)
    )
    answers = ask(server, content)
    assert [answer["custom_id"] for answer in answers] == ["0", "1", "2", "3", "4"]
    for answer, (url, body) in zip(answers, bodies, strict=True):
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == server.post(url, body).json()
    assert len({answer["response"]["request_id"] for answer in answers}) == 5
    assert ask(server, b"") == ask(server, b"\n \n") == []
    assert len(ask(server, line("a").rstrip())) == 1  # without an end of line


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        (b"{", 400, "invalid_json"), (b"\xff\xfe", 400, "invalid_json"), (b"[]", 400, "invalid_value"),
        (b'{"url": "/v1/translate"}', 400, "missing_field"), (line("").rstrip(), 422, "empty"),
        (b'{"url": "/v1/batch", "body": {}}', 400, "invalid_value"),
        (b'{"url": "/healthz", "body": {}}', 400, "invalid_value"),
        (line("a", stream=True).rstrip(), 400, "invalid_value"),
        (line("a", num_beams=64).rstrip(), 400, "limit_exceeded"),
        (line("a", model="none").rstrip(), 404, "model_not_found"), (line("a" * 30_000).rstrip(), 413, "too_long"),
        (line("a" * 3_000_000).rstrip(), 413, "body_too_large"),
    ],
)  # fmt: skip
def test_a_bad_line_fails_alone(bad: bytes, status: int, code: str) -> None:
    with in_process(limits={"body_bytes": 2**20}) as server:
        answers = ask(server, line("a b", "first") + bad + b"\n" + line("c", "last"))
    assert [answer["response"]["status_code"] for answer in answers] == [200, status, 200]
    assert answers[1]["response"]["body"]["error"]["code"] == code
    assert [answers[0]["custom_id"], answers[2]["custom_id"]] == ["first", "last"]


def test_the_whole_needs_a_content_type_a_key_and_a_place() -> None:
    with in_process(keys=(api_key(KEY),), limits={"batches": 1}) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        refused = server.request(
            "POST", "/v1/batch", content=line("a"), headers={**headers, "content-type": "text/plain"}
        )
        assert error_of(refused, 415)["code"] == "unsupported_media_type"
        assert error_of(server.request("POST", "/v1/batch", content=line("a"), headers=TYPE), 401)
        urgent = {**headers, **TYPE, "x-request-priority": "urgent"}
        assert (
            "is none of"
            in error_of(server.request("POST", "/v1/batch", content=line("a"), headers=urgent), 400)["message"]
        )
        assert ask(server, line("a"), **headers)[0]["response"]["status_code"] == 200

        async def two() -> list[int]:
            first = Talk(server, headers)
            await first.say(line("a"))
            await first.hear()
            other = await server.send("POST", "/v1/batch", content=line("a"), headers={**TYPE, **headers})
            await first.end()
            return [first.status, other.status_code]

        assert server.wait(two()) == [200, 429]


class Talk:
    """A client that sends and reads as it likes, over ASGI."""

    def __init__(self, server: InProcess, headers: dict[str, str] | None = None) -> None:
        given = {"host": "localhost", **TYPE, **(headers or {})}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/batch", "raw_path": b"/v1/batch", "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("test", 1), "server": ("test", 80),
        }  # fmt: skip
        self.status = 0
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        self.call = asyncio.ensure_future(server.app(scope, self._sent.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["body"]:
            self._heard.put_nowait(message["body"])

    async def say(self, content: bytes, more: bool = True) -> None:
        self._sent.put_nowait({"type": "http.request", "body": content, "more_body": more})

    async def hear(self) -> Any:
        return json.loads(await asyncio.wait_for(self._heard.get(), 10))

    async def leave(self) -> None:
        self._sent.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self.call, 10)

    async def end(self) -> list[Any]:
        """What is still to be heard after the last line."""
        await self.say(b"", more=False)
        await asyncio.wait_for(self.call, 30)
        return [json.loads(self._heard.get_nowait()) for _ in range(self._heard.qsize())]


def test_answers_come_while_later_lines_are_still_to_be_sent(server: InProcess) -> None:
    async def talk() -> None:
        client = Talk(server)
        for word in ("one", "two", "three"):
            whole = line(word, word)
            await client.say(whole[:7])
            await client.say(whole[7:])
            answer = await client.hear()
            assert (answer["custom_id"], answer["response"]["body"]["results"][0]["sequences"][0]["text"]) == (
                word, word.upper(),
            )  # fmt: skip
        assert await client.end() == []

    server.wait(talk())


def test_answers_keep_their_order_whatever_takes_longer(server: InProcess) -> None:
    numbers = [str(i) for i in range(200)]
    content = b"".join(line("a " * (29 if int(i) % 3 == 0 else 1), i) for i in numbers)
    assert [answer["custom_id"] for answer in ask(server, content)] == numbers


def test_who_sends_everything_before_reading_is_answered_all_the_same() -> None:
    """Far more lines than may be at work; the client reads nothing until it has sent the last."""
    with in_process(limits={"batch_window": 4}) as server:

        async def talk() -> list[Any]:
            client = Talk(server)
            client.reads.clear()
            for i in range(500):
                await client.say(line("a b", str(i)))
            while client._sent.qsize():  # all of it is taken
                await asyncio.sleep(0.01)
            assert len(server.pipelines["en-de"].submitted) <= 5
            client.reads.set()
            return await client.end()

        assert [answer["custom_id"] for answer in server.wait(talk())] == [str(i) for i in range(500)]


def test_what_waits_is_bounded() -> None:
    with in_process(limits={"batch_window": 1, "batch_bytes": 1000}) as server:

        async def talk() -> None:
            client = Talk(server)
            client.reads.clear()
            for i in range(500):
                await client.say(line("a b", str(i)))
            await asyncio.sleep(0.5)
            assert client._sent.qsize() > 400  # the rest is left with the client
            client.reads.set()
            assert len(await client.end()) == 500

        server.wait(talk())


def test_a_full_queue_holds_lines_back_and_fails_none() -> None:
    with in_process(max_requests=2, limits={"inputs": 2, "batch_window": 50}) as server:
        answers = ask(server, b"".join(line(["a b", "c"], str(i)) for i in range(20)))
    assert [answer["response"]["status_code"] for answer in answers] == [200] * 20


class FakeApp:
    """In place of `call`: takes so many lines at a time, each for a while, and refuses the others."""

    def __init__(self, places: int, seconds: float, retry_after_s: float) -> None:
        self.free = places
        self.seconds = seconds
        self.retry_after_s = retry_after_s
        self.asked: list[tuple[int, float]] = []  # the line, and when

    async def call(self, app: Any, scope: Any, content: bytes) -> tuple[int, bytes, float]:
        self.asked.append((json.loads(content)["inputs"], time.monotonic()))
        if not self.free:
            return 429, b"{}", self.retry_after_s
        self.free -= 1
        await asyncio.sleep(self.seconds)
        self.free += 1
        return 200, b"{}", 0.0


def test_a_refused_line_is_asked_again_as_soon_as_another_ends(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FakeApp(places=5, seconds=0.2, retry_after_s=60)
    monkeypatch.setattr("serving.batch.call", app.call)
    began = time.monotonic()
    assert len(ask(server, b"".join(map(line, range(20))))) == 20
    assert 0.79 <= time.monotonic() - began < 2.5  # four turns of five lines, not sixteen of which most have one
    assert [number for number, _ in app.asked] == [
        *range(20),
        *range(5, 20),
    ]  # again when there is room, and not before


def test_a_refused_line_waits_for_so_long_as_it_is_told_where_no_other_ends(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all that wait are asked, and do not wait for each other's answers."""
    app = FakeApp(places=0, seconds=0.5, retry_after_s=0.4)
    monkeypatch.setattr("serving.batch.call", app.call)
    server.loop.call_soon_threadsafe(server.loop.call_later, 0.6, setattr, app, "free", 10)
    began = time.monotonic()
    assert len(ask(server, b"".join(map(line, range(10))))) == 10
    assert time.monotonic() - began < 3
    assert [number for number, _ in app.asked] == 3 * list(range(10))
    times = [at for number, at in app.asked if number == 9]
    assert all(later - at >= 0.39 for at, later in itertools.pairwise(times))


def test_who_leaves_frees_what_his_lines_held() -> None:
    with in_process() as server:
        pipeline = server.pipelines["en-de"]
        pipeline.gate.clear()

        async def talk() -> None:
            client = Talk(server)
            await client.say(b"".join(line("a " * 20, str(i)) for i in range(10)))
            while not pipeline.live:
                await asyncio.sleep(0.01)
            pipeline.step_s = 0.05
            pipeline.gate.set()
            await client.leave()

        server.wait(talk())
        steps = pipeline.steps
        while pipeline.live:
            assert pipeline.steps <= steps + 3
        assert server.runner.num_open == 0


def test_who_leaves_while_his_lines_wait_is_noticed() -> None:
    with in_process(limits={"batch_window": 1, "batch_bytes": 500}) as server:
        server.pipelines["en-de"].step_s = 0.02

        async def talk() -> int:
            client = Talk(server)
            await client.say(b"".join(line("a " * 20, str(i)) for i in range(200)))
            await client.hear()
            await client.leave()
            return len(server.pipelines["en-de"].submitted)

        assert server.wait(talk()) < 10


def test_lines_that_wait_are_bounded_in_memory_however_short_they_are() -> None:
    lines = batch._Lines(longest=1000, most_waiting=2**20)
    given: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def fill() -> int:
        for _ in range(100):
            given.put_nowait({"type": "http.request", "body": b"xy\n" * 2**14, "more_body": True})
        reading = asyncio.ensure_future(lines.read(given.get))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        assert given.qsize() > 90  # the rest is left with the client
        reading.cancel()
        return len(lines._lines) * (33 + 2 + 8)  # an object of Python's, its text, and its place

    assert asyncio.run(fill()) < 3 * 2**20


@pytest.mark.parametrize("is_long", [False, True])
def test_a_line_is_no_longer_than_its_own_request(monkeypatch: pytest.MonkeyPatch, is_long: bool) -> None:
    """Without a blank in it, as some write JSON; of a long one this is found out by another thread."""
    monkeypatch.setattr(batch, "LONG", 0 if is_long else 2**16)
    with in_process(limits={"body_bytes": 400}) as server:
        body = json.dumps({"inputs": ["a"] * 85}, separators=(",", ":")).encode()
        whole = b'{"url":"/v1/translate","body":' + body + b"}\n"
        assert len(whole) < 400 < len(json.dumps(json.loads(body)))
        (answer,) = ask(server, whole)
    assert answer["response"]["status_code"] == 200 and len(answer["response"]["body"]["results"]) == 85


def test_a_long_line_that_trickles_in_is_read_once() -> None:
    long = line("a b", "long")[:-1] + b" " * 4_000_000 + b"\n"
    with in_process(limits={"body_bytes": 8_000_000}) as server:

        async def talk() -> list[dict[str, Any]]:
            client = Talk(server)
            await client.say(long[:-2000])
            began = time.process_time()
            for i in range(len(long) - 2000, len(long)):
                await client.say(long[i : i + 1])
            while client._sent.qsize():
                await asyncio.sleep(0)
            assert time.process_time() - began < 0.5  # it took 7 s, when each piece was joined to all before it
            return await client.end()

        (answer,) = server.wait(talk())
    assert answer["custom_id"] == "long" and answer["response"]["status_code"] == 200


def test_lines_are_what_stands_between_their_ends_however_they_are_cut() -> None:
    body = b"".join(
        [line("a", "0"), b"  \r\n\n", b"x" * 5000, b"\n", line("b", "2"), b"x" * 5000, b"\n", line("c", "4")[:-1]]
    )
    with in_process(limits={"body_bytes": 1000}) as server:

        async def talk(size: int) -> list[dict[str, Any]]:
            client = Talk(server)
            for at in range(0, len(body), size):
                await client.say(body[at : at + size])
            return await client.end()

        for size in (7, 1000, 1001, 4096, len(body)):
            answers = server.wait(talk(size))
            assert [answer["custom_id"] for answer in answers] == ["0", None, "2", None, "4"]
            assert [answer["response"]["status_code"] for answer in answers] == [200, 413, 200, 413, 200]


@pytest.mark.parametrize(("batch_s", "header"), [(0.5, None), (3600, "0.7")])
def test_a_batch_has_an_end(batch_s: float, header: str | None) -> None:
    """Of the service's, or of what its client allows."""
    with in_process(limits={"batch_s": batch_s}) as server:
        server.pipelines["en-de"].step_s = 0.02
        more = {"x-request-timeout-seconds": header} if header else {}
        answers = ask(server, b"".join(line("a " * 20, str(i)) for i in range(100)), **more)
        assert answers[-1]["error"]["code"] == "deadline_passed" and 1 <= len(answers) < 100
        assert all(answer["response"]["status_code"] == 200 for answer in answers[:-1])


def test_a_fault_of_ours_ends_its_own_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process() as server:
        monkeypatch.setattr("serving.batch.call", failing_once(batch.call))
        answers = ask(server, line("a", "first") + line("b", "second"))
    assert [answer["response"]["status_code"] for answer in answers] == [500, 200]
    assert answers[0]["response"]["body"]["error"]["code"] == "internal_error" and "secret" not in str(answers)


def failing_once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count()

    async def calling(*args: Any) -> Any:
        if next(calls) == 0:
            raise ZeroDivisionError("secret")
        return await function(*args)

    return calling
