"""Batch: many requests in one, a line of JSON each, answered line by line in their order.

    {"custom_id": "a", "url": "/v1/translate", "body": {"inputs": "A dog runs."}}
    {"custom_id": "a", "response": {"status_code": 200, "request_id": "...-1", "body": {...}}, "error": null}

Lines and answers have the form of OpenAI's batch files. Each line is a request of its own to the same app, with the
headers of the whole: so it is checked, bounded, counted and logged as any other, and a bad one fails alone. What is no
such line, or too long for one, is answered here, and is no request to anybody. Answers go out while later lines are
still being read; a full queue holds a line back, and the client with it, in place of a 429.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqmodels.config import Strict
from seqmodels.errors import QueueFullError
from serving.config import Limits
from serving.errors import HttpError, invalid_request
from serving.guard import exchange_of, priority_of, told_error
from serving.http import TIMEOUT_HEADER, refuse_packed, seconds_allowed, unless

logger = logging.getLogger(__name__)

URLS = ("classify", "tag", "translate", "caption", "generate", "score", "completions")
BESIDE = 64  # bytes of memory that a waiting line takes beside its own
LONG = 2**16  # bytes of a line that is parsed in a thread, for it takes milliseconds
KEPT = ("type", "asgi", "http_version", "scheme", "root_path", "client", "server", "state", "extensions")


class BatchLine(Strict):
    """One request. `method` and what else OpenAI's files hold may stand there, and is not heeded."""

    custom_id: str | None = None
    url: Literal[tuple(f"/v1/{name}" for name in URLS)]  # type: ignore[valid-type]  # a type made of data
    body: dict[str, Any]
    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"example": {"custom_id": "a", "url": "/v1/translate", "body": {"inputs": "A dog runs."}}},
    )


class BatchResponse(Response):
    """Reads its request's body itself, line by line, while it answers."""

    def __init__(self, app: ASGIApp, request: Request, limits: Limits, batches: asyncio.Semaphore) -> None:
        """batches: holds one place for each that may run at a time. Raises QueueFullError where all are taken, and
        HttpError for a wrong header."""
        self._seconds = seconds_allowed(request, limits.batch_s)
        priority_of(request)  # of all lines
        refuse_packed(request)
        if batches.locked():
            raise QueueFullError(f"{limits.batches} batches are at work, the most allowed here; try again later")
        super().__init__(headers={"cache-control": "no-cache"}, media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._app = app
        self._request = request
        self._limits = limits
        self._batches = batches
        self._room = asyncio.Condition()  # of which one that waits is told when a line ends, in their order
        self._lines = _Lines(limits.body_bytes, limits.batch_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._batches:
            try:
                async with asyncio.timeout(self._seconds):
                    await unless(self._lines.read(receive), self._send_all(send))
            except TimeoutError:
                await _send_line(send, _last_line(self._seconds))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        """Up to `batch_window` lines are at work at a time, and as many answers wait for their turn."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        window = asyncio.Semaphore(self._limits.batch_window)
        working: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()

        async def begin() -> None:
            number = 0
            async for line in self._lines:
                await window.acquire()
                number += 1
                working.put_nowait(tasks.create_task(self._answer(number, line)))
            working.put_nowait(None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(begin())
            while task := await working.get():
                await _send_line(send, await task)
                window.release()

    async def _answer(self, number: int, line: bytes | None) -> bytes:
        """line: None where it was too long to be kept."""
        request_id = f"{exchange_of(self._request).request_id[:100]}-{number}"  # not too long for one
        custom_id, status, body = None, 0, b""
        try:
            if line is None:
                message = f"this line is longer than {self._limits.body_bytes} bytes, the most allowed here"
                raise HttpError(413, message, "body_too_large")
            parsed, content = await asyncio.to_thread(_parse, line) if len(line) > LONG else _parse(line)
            custom_id = parsed.custom_id
            status, body = await self._ask(parsed.url, content, request_id)
        except Exception as error:  # a fault of ours ends its own line alone
            told = told_error(error)
            if told.status == 500:
                logger.exception("a line of a batch failed")
            status, body = told.status, json.dumps(told.body).encode()
        about = {"custom_id": custom_id, "status_code": status, "request_id": request_id}
        return _line(about, body)

    async def _ask(self, url: str, content: bytes, request_id: str) -> tuple[int, bytes]:
        """Status and body of the answer. A line that is refused, for the queue is full or the key has asked too often,
        is asked again: after so long as it is told to wait, or as soon as another line of this batch ends."""
        while True:
            status, body, retry_after_s = await call(self._app, self._scope(url, request_id), content)
            async with self._room:
                if status != 429:
                    self._room.notify()
                    return status, body
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_after_s):
                        await self._room.wait()

    def _scope(self, path: str, request_id: str) -> Scope:
        outer = self._request.scope
        # The time that the whole is allowed is no time of a line.
        own = TIMEOUT_HEADER.encode()
        replaced = (b"content-type", b"content-length", b"transfer-encoding", b"x-request-id", own)
        headers = [(name, value) for name, value in outer["headers"] if name not in replaced]
        headers += [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        target = {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        return {name: outer[name] for name in KEPT if name in outer} | target


class _Lines:
    """The lines of a body, as they come. All of it is read at once, up to `most_waiting` bytes, so that a client that
    sends everything before it reads an answer does not wait for us while we wait for it."""

    def __init__(self, longest: int, most_waiting: int) -> None:
        self._longest = longest
        self._most_waiting = most_waiting
        self._open = bytearray()  # of the line that has begun
        self._is_too_long = False  # so that no more of it is kept
        self._lines: deque[bytes | None] = deque()
        self._num_waiting = 0  # bytes
        self._is_over = False
        self._changed = asyncio.Condition()

    async def read(self, receive: Receive) -> None:
        """Until the client leaves, which raises ClientDisconnect: also after the last line, for answers go on. The next
        message is asked for before there is room for it, so that who leaves meanwhile is noticed."""
        coming = asyncio.ensure_future(receive())
        try:
            while True:
                message = await coming
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                coming = asyncio.ensure_future(receive())
                if self._is_over:
                    continue
                self._take(message.get("body", b""), is_last=not message.get("more_body", False))
                async with self._changed:
                    self._changed.notify_all()
                if not self._is_over:
                    await unless(_leaving(coming), self._room())
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def _room(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_waiting < self._most_waiting)

    def _take(self, body: bytes, is_last: bool) -> None:
        first, *others = body.split(b"\n")
        self._go_on(first)
        for piece in others:
            self._put_open()
            self._go_on(piece)
        if is_last:
            self._put_open()
        self._is_over = is_last

    def _go_on(self, piece: bytes) -> None:
        """With the open line. What is there of it is not read again, for it may come byte by byte."""
        self._is_too_long |= len(self._open) + len(piece) > self._longest
        if self._is_too_long:
            self._open.clear()
        else:
            self._open += piece

    def _put_open(self) -> None:
        """The open line is whole."""
        line = None if self._is_too_long else bytes(self._open)
        self._open.clear()
        self._is_too_long = False
        if line is not None and not line.strip():
            return
        self._lines.append(line)
        self._num_waiting += BESIDE + len(line or b"")

    async def __aiter__(self) -> AsyncIterator[bytes | None]:
        """None in place of a line that was too long."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._lines or self._is_over)
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._num_waiting -= BESIDE + len(line or b"")
                self._changed.notify_all()
            yield line


async def _leaving(coming: "asyncio.Future[Message]") -> None:
    """Raises ClientDisconnect where that is what comes next."""
    if (await asyncio.shield(coming))["type"] == "http.disconnect":
        raise ClientDisconnect
    await asyncio.Event().wait()


async def call(app: ASGIApp, scope: Scope, content: bytes) -> tuple[int, bytes, float]:
    """Status and body of an app's answer to one whole request; and after how many seconds to ask again, if at all."""
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    status, parts, retry_after_s = 0, [], 0.0

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # nobody leaves: who gives up is cancelled
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status, retry_after_s
        if message["type"] == "http.response.start":
            status = message["status"]
            retry_after_s = float(dict(message["headers"]).get(b"retry-after", 1))
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts), retry_after_s


def _parse(line: bytes) -> tuple[BatchLine, bytes]:
    """And its body, in no more bytes than it came in. Raises HttpError."""
    try:
        parsed = BatchLine.model_validate_json(line)
    except ValidationError as error:
        raise invalid_request(error) from None
    if parsed.body.get("stream"):
        raise HttpError(
            400, "body.stream is set, but a batch answers in whole lines; leave it out", "invalid_value", "body.stream"
        )
    return parsed, json.dumps(parsed.body, ensure_ascii=False, separators=(",", ":")).encode()


async def _send_line(send: Send, line: bytes) -> None:
    await send({"type": "http.response.body", "body": line, "more_body": True})


def _last_line(seconds: float) -> bytes:
    """In place of the answers that are missing."""
    message = f"this batch has taken {seconds:.3g} s, the most allowed; send the lines that have no answer again"
    error = {"code": "deadline_passed", "message": message}
    return json.dumps({"custom_id": None, "response": None, "error": error}).encode() + b"\n"


def _line(about: dict[str, Any], body: bytes) -> bytes:
    """The body is JSON already, and has no end of line in it."""
    start = json.dumps({"custom_id": about.pop("custom_id"), "response": about}, ensure_ascii=False)
    return start.removesuffix("}}").encode() + b', "body": ' + body + b'}, "error": null}\n'
