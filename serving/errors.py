"""The one error shape of the service, and which HTTP status each error has.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Messages are ours: they hold field names, numbers and limits, never an exception's text or what the user sent; but for
the words of a forced prefix that a model does not know, a few and cut short.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from seqmodels.errors import DeadlineError, InputError, QueueFullError, SeqModelsError, TooLongError, UnsupportedError
from serving.rates import RateError

EMPTY = "empty"  # the code that a pipeline gives to an input with nothing in it
INVALID_INPUT = "invalid_input"  # the code of an input that is of no kind we know


class EngineError(SeqModelsError):
    """A model failed while it worked on a request: a fault of ours, so the text is fixed."""

    def __init__(self) -> None:
        super().__init__("the model failed while working on this request; the server's log says why")


class ClosingError(SeqModelsError):
    """The service is shutting down and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("this server is shutting down; send the request again")


@dataclass
class HttpError(Exception):
    """An error as the client sees it."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.status in (401, 403):
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def http_error(error: BaseException) -> HttpError:
    """Any exception to what its client is told. What we did not raise on purpose becomes a fixed 500."""
    match error:
        case HttpError():
            return error
        case TooLongError():
            return HttpError(413, str(error), error.code, error.param)
        case UnsupportedError():
            return HttpError(415, str(error), error.code, error.param)
        case InputError():
            return HttpError(422 if error.code == EMPTY else 400, str(error), error.code, error.param)
        case QueueFullError():
            return HttpError(
                429, str(error), "queue_full", headers={"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
            )
        case RateError():
            return HttpError(429, str(error), "rate_limited", headers={"retry-after": str(error.retry_after_s)})
        case DeadlineError():
            return HttpError(408, str(error), "deadline_passed")
        case ClosingError():
            return HttpError(503, str(error), "shutting_down", headers={"retry-after": "1"})
        case EngineError():
            return HttpError(500, str(error), "engine_error")
    return HttpError(500, "internal error; the server's log says why", "internal_error")


def invalid_request(error: ValidationError) -> HttpError:
    """The first fault of a request body: its field and what is allowed there, without the value."""
    fault = error.errors(include_url=False, include_input=False)[0]
    param = _field(fault["loc"])
    kind = fault["type"]
    if kind == "json_invalid":
        # The parser's own words: what and where (a lone surrogate, a nesting too deep), and nothing of the body.
        reason = fault["ctx"]["error"]
        return HttpError(400, f"the request body cannot be read as JSON in UTF-8: {reason}", "invalid_json")
    if kind == "extra_forbidden":
        return HttpError(400, f"{param} is not a field of this request", "unknown_field", param)
    if kind == "missing":
        return HttpError(400, f"{param} is missing", "missing_field", param)
    if kind == INVALID_INPUT:  # of a union of ours, whose message goes on after the field's name
        return HttpError(400, f"{param} {fault['msg']}", INVALID_INPUT, param)
    if kind == "value_error":  # raised by a validator of ours, so the text is ours too
        return HttpError(400, fault["msg"].removeprefix("Value error, "), "invalid_value", param)
    expected = fault["msg"].removeprefix("Input ").removeprefix("Tuple ")
    return HttpError(400, f"{param or 'the request body'} {expected}", "invalid_value", param)


def shown(number: int) -> str:
    """A client's number, which may have thousands of digits; the answer need not."""
    return str(number) if number < 10**9 else "very large"


def _field(location: tuple[int | str, ...]) -> str | None:
    """("inputs", "~list", 3, "~words", "words") -> "inputs[3].words"; parts with ~ name kinds, not fields."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("~"):
            name = part if part.isidentifier() and len(part) <= 40 else "?"  # a client may call a field anything
            path += f".{name}" if path else name
    return path or None
