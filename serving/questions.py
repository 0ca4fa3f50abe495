"""Questions: requests to the service as data. What is sent, how an answer is read, and when it is asked for again.

Half of both clients; knows no sockets. A question is asked again, once and under the same request id, where its
connection was refused or broke, or where a 500, 502 or 503, or Ray's own 404, says that a replica died or is shutting
down; and only before the first byte of an answer. That is safe, for no request changes anything on the server. What is
sampled without a seed may come out otherwise the second time.
"""

import base64
import functools
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from seqmodels.errors import InputError, SeqModelsError
from serving.http import PRIORITY_HEADER, TIMEOUT_HEADER
from serving.schema import (
    ClassifyResponse,
    ErrorResponse,
    GenerateResponse,
    ModelCard,
    ModelList,
    Response,
    ScoreResponse,
    TagResponse,
)

PAUSE_S = 0.1  # before a second try, in which a proxy learns that a replica is gone
MOST_PAUSE_S = 1.0  # where the service asks for longer
BATCH_LINES = 1000  # of one request to /v1/batch; a longer batch becomes several
BATCH_BYTES = 4 * 2**20  # the same, and less than any server would leave unread while it waits for us
BATCH_S = 3600.0  # for the whole of one, where Ray's proxy would end it as early as any other request
LONGEST_S = 7 * 24 * 3600
REPLICA_GONE = (500, 502, 503)
NO_PATH = b"Path '"  # so begins what Ray says in a 404 where the service is ending

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Answer = TypeVar("Answer", bound=BaseModel)


class ServiceError(SeqModelsError):
    """The service refused a request, failed, or could not be reached.

    `status`: HTTP's; 0 where there was none, and inside a stream. `code`: a fixed word that programs can test, which is
    `unreachable`, `timeout`, `interrupted` (in the middle of an answer), `unreadable` (an answer that is none of this
    service's) and `unknown` (a refusal that is none) where the client found it out. `param`: the field at fault.
    `request_id`: as the server's log names the request. `retry_after_s`: when to ask again, where the server says so.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "unknown",
        param: str | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class Delta(NamedTuple):
    """More text of a sequence, which is one of those that answer an input."""

    input: int
    sequence: int
    text: str


class Reader(Protocol[T_co]):
    """Makes the parts of an answer from its bytes, as they come. Raises ServiceError."""

    def push(self, chunk: bytes) -> Iterable[T_co]: ...

    def end(self) -> Iterable[T_co]: ...


@dataclass(frozen=True)
class Question(Generic[T]):
    """timeout_s: until the answer, or the next part of it, must be there; the client's where it is None. whole_s: until
    all of it must be, where that is longer."""

    path: str
    reader: Callable[[], Reader[T]]
    content: bytes | None = None
    content_type: str = "application/json"
    priority: str | None = None
    timeout_s: float | None = None
    whole_s: float | None = None
    tries: int = 2


def classify(inputs: Any, **options: Any) -> Question[ClassifyResponse]:
    """A label for each input."""
    return _task("classify", ClassifyResponse, inputs, options)


def tag(inputs: Any, **options: Any) -> Question[TagResponse]:
    """Labelled spans of each input."""
    return _task("tag", TagResponse, inputs, options)


def translate(inputs: Any, **options: Any) -> Question[GenerateResponse]:
    """Text to text."""
    return _task("translate", GenerateResponse, inputs, options)


def caption(inputs: Any, **options: Any) -> Question[GenerateResponse]:
    """A text about each picture, clip or series."""
    return _task("caption", GenerateResponse, inputs, options)


def generate(inputs: Any = None, **options: Any) -> Question[GenerateResponse]:
    """Text that goes on from each input or, without one, is written freely."""
    return _task("generate", GenerateResponse, inputs, options)


def score(targets: str | list[str], inputs: Any = None, **options: Any) -> Question[ScoreResponse]:
    """How likely each target is, given its input."""
    return _task("score", ScoreResponse, inputs, {"targets": targets, **options})


def models() -> Question[list[ModelCard]]:
    """What is served."""
    return Question("/v1/models", lambda: _Whole(lambda content: _parsed(ModelList, content).data))


def ready() -> Question[bool]:
    """Answered by a service that is warm, refused by another; asked once, for who asks will ask again."""
    return Question("/readyz", lambda: _Whole(lambda content: True), tries=1)


def stream(task: str, inputs: Any = None, **options: Any) -> Iterator[Question[Delta]]:
    """Text as it is decided, of a task that writes text. Closing the stream early ends the work on the server. One that
    breaks after its first text raises, for it cannot be begun anew. States come with whole answers alone."""
    priority, timeout_s = options.pop("priority", None), options.pop("timeout_s", None)
    content = _json({**_body({"inputs": inputs, **options}), "stream": True})
    yield Question(f"/v1/{task}", _Deltas, content, priority=priority, timeout_s=timeout_s)


def batch(
    requests: Iterable[tuple[str, Mapping[str, Any]]], *, priority: str | None = None, timeout_s: float | None = None
) -> Iterator[Question[Response | ServiceError]]:
    """Many requests, each a task and its body, such as ("translate", {"inputs": "A dog runs.", "num_beams": 5}).

    Gives for each in turn the answer, or the ServiceError of one that failed; what ends the whole batch is raised. So
    many as make one HTTP request are taken at a time, and their answers given before more are taken. timeout_s: until
    the next answer.
    """
    tasks: list[str] = []
    lines: list[bytes] = []
    num_bytes = 0

    def question() -> Question[Response | ServiceError]:
        asked = tuple(tasks)
        return Question(
            "/v1/batch", lambda: _Answers(asked), b"".join(lines), "application/x-ndjson", priority, timeout_s, BATCH_S
        )

    for task, body in requests:
        if task not in ANSWERS:
            raise InputError(
                f"the task of a request is {task}, but it must be one of {', '.join(ANSWERS)}", param="task"
            )
        line = _json({"url": f"/v1/{task}", "body": _body(body)}) + b"\n"
        if lines and (len(lines) == BATCH_LINES or num_bytes + len(line) > BATCH_BYTES):
            yield question()
            tasks, lines, num_bytes = [], [], 0
        tasks.append(task)
        lines.append(line)
        num_bytes += len(line)
    if lines:
        yield question()


def checked_timeout(timeout_s: float) -> float:
    """Raises InputError for what is no time to wait."""
    if isinstance(timeout_s, int | float) and 0 < timeout_s <= LONGEST_S:
        return timeout_s
    raise InputError(f"timeout_s is {timeout_s!r}; give seconds above 0, at most {LONGEST_S}", param="timeout_s")


def checked_header(text: str | None, name: str) -> str:
    """Without blanks around it, as of a file that ends with a line. Raises InputError, which does not tell it, for what
    no header can hold."""
    stripped = (text or "").strip()
    if text and not stripped:
        raise InputError(f"{name} holds nothing but blanks; give one, or leave it out", param=name)
    if not (stripped.isascii() and stripped.isprintable()):
        message = f"{name} holds a character that no header can; give letters, digits and signs of ASCII"
        raise InputError(message, param=name)
    return stripped


class Asking(Generic[T]):
    """A question while it is asked. A client sends `request()`, hands over what comes, and after a failure waits for as
    long as `pause_after` says before it does so again."""

    def __init__(self, question: Question[T], url: str, timeout_s: float) -> None:
        """Raises InputError for what cannot be sent."""
        self._question = question
        self._url = url
        self._timeout_s = timeout_s if question.timeout_s is None else checked_timeout(question.timeout_s)
        self._priority = checked_header(question.priority, "priority")
        self._deadline = time.monotonic() + self._timeout_s
        self._request_id = uuid.uuid4().hex
        self._tries_left = question.tries

    def request(self) -> dict[str, Any]:
        """The next try, as httpx takes it."""
        self._tries_left -= 1
        self._reader = self._question.reader()
        self._response: httpx.Response | None = None
        self._refusal = b""
        left_s = max(self._deadline - time.monotonic(), 0.001)
        headers = {"x-request-id": self._request_id, TIMEOUT_HEADER: f"{self._question.whole_s or left_s:.3f}"}
        if self._priority:
            headers[PRIORITY_HEADER] = self._priority
        if self._question.content is not None:
            headers["content-type"] = self._question.content_type
        return {
            "method": "GET" if self._question.content is None else "POST",
            "url": self._question.path,
            "content": self._question.content,
            "headers": headers,
            "timeout": left_s,
        }

    def begin(self, response: httpx.Response) -> None:
        """Take the head of an answer."""
        self._response = response

    def read(self, chunk: bytes) -> Iterable[T]:
        """The parts of an answer that are whole with this."""
        assert self._response is not None
        if self._response.status_code == 200:
            return self._reader.push(chunk)
        self._refusal += chunk
        return ()

    def end(self) -> Iterable[T]:
        """What is left of an answer that has ended. Raises ServiceError where it is a refusal."""
        assert self._response is not None
        if self._response.status_code == 200:
            return self._reader.end()
        raise _refused(self._response, self._refusal, self._url)

    def pause_after(self, error: httpx.HTTPError | ServiceError) -> float:
        """Seconds until the next try. Raises ServiceError where there is none."""
        told = error if isinstance(error, ServiceError) else self._told(error)
        told.request_id = told.request_id or self._request_id
        pause_s = min(told.retry_after_s or PAUSE_S, MOST_PAUSE_S)
        in_time = time.monotonic() + pause_s < self._deadline
        if self._tries_left and in_time and self._may_be_repeated(error):
            return pause_s
        raise told from None

    def _may_be_repeated(self, error: httpx.HTTPError | ServiceError) -> bool:
        if isinstance(error, ServiceError):
            return error.code == "shutting_down" or (error.status in REPLICA_GONE and error.code == "unknown")
        return isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError) and not self._has_begun

    @property
    def _has_begun(self) -> bool:
        return self._response is not None and self._response.num_bytes_downloaded > 0

    def _told(self, error: httpx.HTTPError) -> ServiceError:
        # What the client itself takes for no request may hold a key.
        is_ours = isinstance(error, httpx.LocalProtocolError)
        reason = type(error).__name__ if is_ours else str(error) or type(error).__name__
        if isinstance(error, httpx.TimeoutException):
            message = f"{self._url} gave no answer in {self._timeout_s:g} s; raise timeout_s, or ask for less at a time"
            return ServiceError(message, code="timeout")
        if self._has_begun:
            return _interrupted(f"{self._url}: {reason}")
        fix = "check the address, such as http://127.0.0.1:8000, and that the service runs there"
        message = f"{self._url} gives no answer ({reason}); {fix}"
        return ServiceError(message, code="unreachable")


class _Whole(Generic[T]):
    """The whole answer at once."""

    def __init__(self, read: Callable[[bytes], T]) -> None:
        self._read = read
        self._chunks: list[bytes] = []

    def push(self, chunk: bytes) -> Iterable[T]:
        self._chunks.append(chunk)
        return ()

    def end(self) -> Iterable[T]:
        return (self._read(b"".join(self._chunks)),)


class _Lines:
    """Whole lines from chunks. Ends of lines are \\n alone: JSON may hold any other that Unicode knows."""

    def __init__(self) -> None:
        self._partial = b""

    def push(self, chunk: bytes) -> list[bytes]:
        *whole, self._partial = (self._partial + chunk).split(b"\n")
        return whole


class _Deltas:
    """Server-sent events: text until the answer, which repeats it."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._event = b""
        self._is_over = False

    def push(self, chunk: bytes) -> Iterator[Delta]:
        for line in self._lines.push(chunk):
            name, _, value = line.partition(b": ")
            if name == b"event":
                self._event = value
            elif name == b"data" and self._event == b"delta":
                told = _parsed(_DeltaEvent, value)
                yield Delta(told.index, told.sequence, told.delta)
            elif name == b"data" and self._event == b"error":
                raise _service_error(value)
            elif name == b"data" and self._event == b"answer":
                self._is_over = True

    def end(self) -> Iterable[Delta]:
        if not self._is_over:
            raise _interrupted("the stream ended before its answer")
        return ()


class _Answers:
    """The lines of a batch, one for each of `tasks` in turn."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._tasks = deque(tasks)
        self._lines = _Lines()

    def push(self, chunk: bytes) -> Iterator[Response | ServiceError]:
        for line in self._lines.push(chunk):
            told = _parsed(_BatchAnswer, line)
            if told.error is not None:
                raise ServiceError(told.error.message, code=told.error.code)
            assert told.response is not None
            yield self._answer(told.response)

    def end(self) -> Iterable[Response | ServiceError]:
        if self._tasks:
            raise _interrupted(f"{len(self._tasks)} lines of a batch have no answer")
        return ()

    def _answer(self, response: "_BatchResponse") -> Response | ServiceError:
        task, content = self._tasks.popleft(), json.dumps(response.body).encode()
        if response.status_code == 200:
            return _parsed(ANSWERS[task], content)
        return _service_error(content, response.status_code, request_id=response.request_id)


class _DeltaEvent(BaseModel):
    index: int
    sequence: int
    delta: str


class _BatchResponse(BaseModel):
    status_code: int
    request_id: str
    body: dict[str, Any]


class _BatchError(BaseModel):
    code: str
    message: str


class _BatchAnswer(BaseModel):
    """error: of the whole batch, in place of the answers that are missing."""

    response: _BatchResponse | None
    error: _BatchError | None


ANSWERS: dict[str, type[Response]] = {
    "classify": ClassifyResponse,
    "tag": TagResponse,
    "translate": GenerateResponse,
    "caption": GenerateResponse,
    "generate": GenerateResponse,
    "score": ScoreResponse,
}


def _task(path: str, shape: type[Answer], inputs: Any, options: dict[str, Any]) -> Question[Answer]:
    """priority and timeout_s are options of this one request; the others go into its body."""
    priority, timeout_s = options.pop("priority", None), options.pop("timeout_s", None)
    content = _json(_body({"inputs": inputs, **options}))
    read = functools.partial(_parsed, shape)
    return Question(f"/v1/{path}", lambda: _Whole(read), content, priority=priority, timeout_s=timeout_s)


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    inputs = fields.get("inputs")
    rest = {name: value for name, value in fields.items() if name != "inputs"}
    return rest if inputs is None else {"inputs": _encoded(inputs), **rest}


def _encoded(item: Any) -> Any:
    """Bytes, wherever they stand, in base64; bytes alone are a picture."""
    if isinstance(item, bytes):
        return {"image": _base64(item)}
    if isinstance(item, list):
        return [_encoded(one) for one in item]
    if isinstance(item, dict):
        return {name: _encoded_value(value) for name, value in item.items()}
    return item


def _encoded_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded_value(one) for one in value]
    return _base64(value) if isinstance(value, bytes) else value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        message = f"this request cannot be written as JSON ({error}); give texts, bytes, finite numbers and lists"
        raise InputError(message) from None


def _parsed(shape: type[Answer], content: bytes) -> Answer:
    try:
        return shape.model_validate_json(content)
    except ValidationError:
        message = f"what came is no {shape.__name__}; check the address, and that client and service are of one version"
        raise ServiceError(message, status=200, code="unreadable") from None


def _refused(response: httpx.Response, content: bytes, url: str) -> ServiceError:
    after, status = response.headers.get("retry-after", ""), response.status_code
    retry_after_s = float(after) if after.isdecimal() else None
    try:
        return _service_error(content, status, retry_after_s=retry_after_s)
    except ValueError:  # of something in between, such as Ray's proxy, which speaks for a replica that died
        code = "queue_full" if b"backpressure" in content else "unknown"
        code = "shutting_down" if status == 404 and content.startswith(NO_PATH) else code
        message = f"{url} answered {status} with no message of the service; check the address, or ask again later"
        return ServiceError(message, status=status, code=code, retry_after_s=retry_after_s)


def _service_error(content: bytes, status: int = 0, **about: Any) -> ServiceError:
    """What the service says of an error. Raises ValueError for what is not the service's."""
    detail = ErrorResponse.model_validate_json(content).error
    return ServiceError(detail.message, status=status, code=detail.code, param=detail.param, **about)


def _interrupted(what: str) -> ServiceError:
    message = f"the answer broke off ({what}); it is not asked for again, for some of it had come: ask anew"
    return ServiceError(message, code="interrupted")
