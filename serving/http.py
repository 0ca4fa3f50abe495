"""The parts of HTTP that no framework does the way we need: bounded bodies, clients that leave, event streams, a guard.

Knows ASGI; knows no model and no route.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import is_known
from serving.errors import HttpError, http_error

logger = logging.getLogger(__name__)

R = TypeVar("R")
Observe = Callable[[str, int, float], None]  # route, status, seconds

WITHOUT_KEY = ("/healthz", "/readyz")
TIMEOUT_HEADER = "x-request-timeout-seconds"  # Ray Serve's own name for it
CLIENT_LEFT = 499  # never sent: the client is gone; for counting only


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises HttpError as soon as it is known to be larger than `most` bytes."""
    too_large = HttpError(413, f"the request body is larger than {most} bytes, the most allowed here", "body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


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
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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


def server_sent_event(data: Any, event: str | None = None) -> bytes:
    """One event, its data as JSON on one line."""
    line = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {line}\n\n".encode()


def error_response(error: BaseException) -> Response:
    """The one error shape, for any exception."""
    if isinstance(error, HTTPException):  # from the router
        error = HttpError(
            error.status_code,
            *ROUTER_ERRORS.get(error.status_code, OTHER_ROUTER_ERROR),
            headers=dict(error.headers or {}),
        )
    told = http_error(error)
    return JSONResponse(told.body, told.status, headers=told.headers)


ROUTER_ERRORS = {
    404: ("there is nothing at this path; /docs lists what there is", "not_found"),
    405: ("this path does not take this method; /docs lists what it takes", "method_not_allowed"),
}
OTHER_ROUTER_ERROR = ("the request could not be read", "invalid_request")


class Guard:
    """Around the whole app: nothing gets in without a key, no exception gets out, every answer is counted."""

    def __init__(self, app: ASGIApp, key_hashes: Sequence[str], observe: Observe) -> None:
        self.app = app
        self.key_hashes = key_hashes
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT
        started_at = time.monotonic()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as error:
            if status != CLIENT_LEFT:
                raise  # after the first byte there is no other status to give
            response = error_response(error)
            if response.status_code == 500:
                logger.exception("unexpected error: %s", scope["path"][:100])
            await response(scope, receive, send_and_note)
        finally:
            # A path that is no route is a client's invention: one name for all, or metrics grow without end.
            route = getattr(scope.get("route"), "path", "none")
            self.observe(route, status, time.monotonic() - started_at)

    def _check_key(self, scope: Scope) -> None:
        if not self.key_hashes or scope["path"] in WITHOUT_KEY:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not is_known(key.strip(), self.key_hashes):
            message = "this server asks for a key: send the header `Authorization: Bearer KEY`"
            raise HttpError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
