"""Guard: around the whole app. Nothing gets in without a key, no exception gets out, every request is told of.

What it finds out about a request, and what others learn of it later, stands in the request's `Exchange`.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqmodels.decoding.request import Times
from serving.auth import ANYBODY, PRIORITIES, ApiKey, find_key
from serving.errors import HttpError, http_error
from serving.http import PRIORITY_HEADER, told_by
from serving.rates import Rates

logger = logging.getLogger(__name__)

WITHOUT_KEY = ("/healthz", "/readyz")
HOST = re.compile(r"(?P<name>[^:\[\]]+|\[[0-9a-fA-F:.]+\])(:\d+)?")
REQUEST_ID = re.compile(r"[a-zA-Z0-9._:=+/-]{1,128}")  # no text, as logs and traces tell it
EXCHANGE = "seqmodels.exchange"  # where in a request's scope its Exchange is
CLIENT_LEFT = 499  # never sent: the client is gone; for counting only
ROUTER_ERRORS = {
    404: ("there is nothing at this path; /docs lists what there is", "not_found"),
    405: ("this path does not take this method; /docs lists what it takes", "method_not_allowed"),
}
NOTHING = "(?!)"  # what no text matches
OTHER_ROUTER_ERROR = ("the request could not be read", "invalid_request")


@dataclass
class Exchange:
    """A request and its answer, as logs and metrics tell of them: no text, no key."""

    request_id: str
    method: str
    traceparent: str | None = None  # the client's trace, as W3C writes it
    key: ApiKey = ANYBODY
    route: str = "none"  # one name for all paths that are none: clients invent them, and metrics would grow without end
    status: int = CLIENT_LEFT
    code: str | None = None  # of an error, also of one inside a stream
    model: str | None = None
    revision: str | None = None
    usage: dict[str, int] = field(default_factory=dict)  # input_tokens and output_tokens
    times: list[Times] = field(default_factory=list)  # of its inputs
    first_byte_s: float | None = None
    seconds: float = 0.0


Admit = Callable[[Request], None]
Observe = Callable[[Exchange], None]


def exchange_of(request: Request) -> Exchange:
    exchange: Exchange = request.scope[EXCHANGE]
    return exchange


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


class Guard:
    """The middleware."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[ApiKey],
        rates: Rates,
        hosts: Sequence[str] | None,
        begin: Observe,
        admit: Admit,
        observe: Observe,
    ) -> None:
        """hosts: names by which clients may call the service; any where None. begin: told of each request first of
        all. admit: raises what a request that has a key is refused with, if it is. observe: told of it at last."""
        self.app = app
        self.keys = keys
        self.hosts = None if hosts is None else _any_of(hosts)
        self.rates = rates
        self.admit = admit
        self.begin = begin
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = scope[EXCHANGE] = Exchange(_request_id(headers), scope["method"], headers.get("traceparent"))
        started_at = time.monotonic()
        self.begin(exchange)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.first_byte_s = time.monotonic() - started_at
            await send(message)

        try:
            if scope["path"] not in WITHOUT_KEY:
                self._check_host(headers)
                exchange.key = self._key(headers)
                self.rates.take(exchange.key)
                self.admit(Request(scope))
            await self.app(scope, told_by(receive), send_and_note)
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

    def _check_host(self, headers: Headers) -> None:
        """A browser that was sent here under a name of somebody else's tells that name."""
        if self.hosts is None:
            return
        host = HOST.fullmatch(headers.get("host", ""))
        if not self.hosts.match(_host_name(host["name"] if host else "")):
            message = "this server is not known by the name in the header Host; see allowed_hosts"
            raise HttpError(421, message, "host_not_allowed", "host")

    def _key(self, headers: Headers) -> ApiKey:
        """The one that came with the request. Raises HttpError where it has none of ours."""
        if not self.keys:
            return ANYBODY
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = find_key(given.strip(), self.keys) if scheme.lower() == "bearer" else None
        if key is None:
            message = "this server asks for a key: send the header `Authorization: Bearer KEY`"
            raise HttpError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        return key


def _any_of(hosts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(_host_name(host)) for host in hosts) or NOTHING)


def _host_name(host: str) -> str:
    """Names of hosts are the same in capitals, and an address of IPv6 with and without its brackets."""
    return host.removeprefix("[").removesuffix("]").lower()


def _request_id(headers: Headers) -> str:
    """The client's, which Ray's proxy gives to every request that has none and tells in the answer; one of ours where
    that is in no form of an id."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
