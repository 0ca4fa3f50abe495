"""The parts of HTTP that no framework does the way we need: bounded bodies, clients that leave, event streams.

Knows ASGI; knows no model and no route.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.errors import HttpError

R = TypeVar("R")

PART = 4_000  # texts and numbers that are written at once: a few milliseconds

PRIORITY_HEADER = "x-request-priority"
TIMEOUT_HEADER = "x-request-timeout-seconds"  # Ray Serve's own name for it


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises HttpError as soon as it is known to be larger than `most` bytes, or is packed."""
    refuse_packed(request)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(most)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        chunks.append(chunk)
    return b"".join(chunks)


def refuse_packed(request: Request) -> None:
    """A few bytes could be a very long text. Raises HttpError."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "the body has a content-encoding; send it uncompressed", "unsupported_media_type")


def _too_large(most: int) -> HttpError:
    return HttpError(413, f"the request body is larger than {most} bytes, the most allowed here", "body_too_large")


def seconds_allowed(request: Request, most: float) -> float:
    """How long the client waits: its header, at most `most`. Raises HttpError for a header that is no time.

    Ray's proxy reads the same header and answers in bare text of its own at that moment; be a little earlier. Where a
    client waits for less than a tenth of a second the way through Ray alone may take as long, and its text comes first.
    """
    header = request.headers.get(TIMEOUT_HEADER)
    if header is None:
        return most
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        message = f"the header {TIMEOUT_HEADER} is not a positive number of seconds"
        raise HttpError(400, message, "invalid_value", TIMEOUT_HEADER)
    return min(most, seconds - min(0.2, seconds / 2))


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, R]) -> R:
    """The result of `work`, or ClientDisconnect, with the work cancelled, when the client closes the connection."""
    return await unless(_client_leaves(receive), work)


async def unless(ending: Coroutine[Any, Any, None], work: Coroutine[Any, Any, R]) -> R:
    """The result of `work`, or what `ending` raises, whichever comes first; the other is cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(ending)
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            leaving.result()
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


def told_by(receive: Receive) -> Receive:
    """As Ray's proxy tells of a client that leaves: by a message, or by an error where it has ended the call itself."""

    async def receive_or_leave() -> Message:
        try:
            return await receive()
        except Exception:
            return {"type": "http.disconnect"}

    return receive_or_leave


class EventStream(Response):
    """Server-sent events. `close` is called however the response ends, even before its first byte."""

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None]) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self.events = events
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._send_all(send))
        finally:
            self.close()

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_json(data: Any) -> str:
    """On one line, with no blank between."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_long_json(data: Any) -> str:
    """The same, written in parts, for a thread: one call of the json module keeps all others waiting until its end."""
    return "".join(_parts(data))


def _parts(data: Any) -> Iterator[str]:
    if _size(data) <= PART or not isinstance(data, dict | list):
        yield as_json(data)
    elif isinstance(data, dict):
        for number, (name, value) in enumerate(data.items()):
            yield f"{',' if number else '{'}{as_json(name)}:"
            yield from _parts(value)
        yield "}"
    else:
        for number, group in enumerate(_groups(data)):
            yield "," if number else "["
            yield from _parts(group[0]) if len(group) == 1 else (as_json(group)[1:-1],)
        yield "]"


def _groups(items: list[Any]) -> Iterator[list[Any]]:
    """Items one after another, as many as are small together; one where it is large by itself."""
    group: list[Any] = []
    size = 0
    for item in items:
        size += (more := _size(item))
        if group and size > PART:
            yield group
            group, size = [], more
        group.append(item)
    yield group


def _size(data: Any) -> int:
    """About how many texts and numbers it holds. Lists in a list are of one kind; objects need not be."""
    if isinstance(data, dict):
        return 1 + sum(map(_size, data.values()))
    if isinstance(data, list) and data:
        return 1 + (sum(map(_size, data)) if isinstance(data[0], dict) else len(data) * _size(data[0]))
    return 1 + len(data) // 64 if isinstance(data, str) else 1


def server_sent_event(data: Any, event: str | None = None, write: Callable[[Any], str] = as_json) -> bytes:
    """One event, its data as JSON on one line."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {write(data)}\n\n".encode()
