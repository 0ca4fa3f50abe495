"""The parts of HTTP that no framework does the way we need: bounded bodies, clients that leave, event streams, a guard.

Knows ASGI; knows no model and no route.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import ANYBODY, PRIORITIES, ApiKey, find_key
from serving.errors import HttpError, http_error
from serving.rates import Rates

logger = logging.getLogger(__name__)

R = TypeVar("R")

WITHOUT_KEY = ("/healthz", "/readyz")
HOST = re.compile(r"(?P<name>[^:\[\]]+|\[[0-9a-fA-F:.]+\])(:\d+)?")
EXCHANGE = "seqmodels.exchange"  # where in a request's scope its Exchange is
PRIORITY_HEADER = "x-request-priority"
TIMEOUT_HEADER = "x-request-timeout-seconds"  # Ray Serve's own name for it
CLIENT_LEFT = 499  # never sent: the client is gone; for counting only


@dataclass
class Exchange:
    """A request and its answer, as logs and metrics tell of them: no text, no key."""

    request_id: str
    method: str
    key: ApiKey = ANYBODY
    route: str = (
        "none"  # a path that is no route is a client's invention: one name for all, or metrics grow without end
    )
    status: int = CLIENT_LEFT
    code: str | None = None  # of an error, also of one inside a stream
    model: str | None = None
    revision: str | None = None
    usage: dict[str, int] = field(default_factory=dict)  # input_tokens and output_tokens
    first_byte_s: float | None = None
    seconds: float = 0.0


Observe = Callable[[Exchange], None]


def exchange_of(request: Request) -> Exchange:
    exchange: Exchange = request.scope[EXCHANGE]
    return exchange


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


def priority_of(request: Request) -> int:
    """How urgent the client says it is: its header, at most what its key allows. Raises HttpError for another word."""
    key = exchange_of(request).key
    highest = PRIORITIES[key.priority]
    header = request.headers.get(PRIORITY_HEADER)
    if header is None:
        return min(PRIORITIES["normal"], highest)
    if header not in PRIORITIES:
        message = f"the header {PRIORITY_HEADER} is none of {', '.join(PRIORITIES)}"
        raise HttpError(400, message, "invalid_value", PRIORITY_HEADER)
    if PRIORITIES[header] > highest:
        message = f"{PRIORITY_HEADER} is {header}, but this key may ask for at most {key.priority}"
        raise HttpError(403, message, "priority_not_allowed", PRIORITY_HEADER)
    return PRIORITIES[header]


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


def _told_by(receive: Receive) -> Receive:
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


def server_sent_event(data: Any, event: str | None = None) -> bytes:
    """One event, its data as JSON on one line."""
    line = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {line}\n\n".encode()


def told_error(error: BaseException) -> HttpError:
    """Any exception as the client is told of it, those of the router too."""
    if isinstance(error, HTTPException):
        message, code = ROUTER_ERRORS.get(error.status_code, OTHER_ROUTER_ERROR)
        return HttpError(error.status_code, message, code, headers=dict(error.headers or {}))
    return http_error(error)


async def router_error(request: Request, error: Exception) -> Response:
    """An answer to what the router does not know."""
    return _error_response(told_error(error), exchange_of(request))


def _error_response(told: HttpError, exchange: Exchange) -> Response:
    exchange.code = told.code
    return JSONResponse(told.body, told.status, headers=told.headers)


ROUTER_ERRORS = {
    404: ("there is nothing at this path; /docs lists what there is", "not_found"),
    405: ("this path does not take this method; /docs lists what it takes", "method_not_allowed"),
}
OTHER_ROUTER_ERROR = ("the request could not be read", "invalid_request")


class Guard:
    """Around the whole app: nothing gets in without a key, no exception gets out, every answer is counted."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[ApiKey], rates: Rates, hosts: Sequence[str] | None, observe: Observe
    ) -> None:
        """hosts: names by which clients may call the service; any where None."""
        self.app = app
        self.keys = keys
        self.hosts = hosts
        self.rates = rates
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange(_request_id(scope), scope["method"])
        started_at = time.monotonic()

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.first_byte_s = time.monotonic() - started_at
            await send(message)

        try:
            if scope["path"] not in WITHOUT_KEY:
                self._check_host(scope)
                exchange.key = self._key(scope)
                self.rates.take(exchange.key)
            await self.app(scope, _told_by(receive), send_and_note)
        except ClientDisconnect:
            exchange.status = CLIENT_LEFT
        except Exception as error:
            if exchange.status != CLIENT_LEFT:
                raise  # after the first byte there is no other status to give
            told = told_error(error)
            if told.status == 500:
                logger.exception("unexpected error: %s", scope["path"][:100])
            await _error_response(told, exchange)(scope, receive, send_and_note)
        finally:
            exchange.route = getattr(scope.get("route"), "path", exchange.route)
            exchange.seconds = time.monotonic() - started_at
            self.observe(exchange)

    def _check_host(self, scope: Scope) -> None:
        """A browser that was sent here under a name of somebody else's tells that name."""
        host = HOST.fullmatch(Headers(scope=scope).get("host", ""))
        name = host["name"].strip("[]").lower() if host else ""
        if self.hosts is not None and not any(fnmatchcase(name, allowed) for allowed in self.hosts):
            message = "this server is not known by the name in the header Host; see allowed_hosts"
            raise HttpError(421, message, "host_not_allowed", "host")

    def _key(self, scope: Scope) -> ApiKey:
        """The one that came with the request. Raises HttpError where it has none of ours."""
        if not self.keys:
            return ANYBODY
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = find_key(given.strip(), self.keys) if scheme.lower() == "bearer" else None
        if key is None:
            message = "this server asks for a key: send the header `Authorization: Bearer KEY`"
            raise HttpError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        return key


def _request_id(scope: Scope) -> str:
    """The client's, which Ray's proxy gives to every request that has none and tells in the answer; cut short."""
    return Headers(scope=scope).get("x-request-id", "")[:100] or uuid.uuid4().hex
