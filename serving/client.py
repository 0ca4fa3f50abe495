"""Client: the service from Python, with typed answers.

    with Client("http://127.0.0.1:8000") as client:
        client.translate(["A dog runs."], num_beams=5).results[0].sequences[0].text

Inputs are what the service takes; pictures may be given as bytes. Options are the fields of serving/schema.py.
"""

import base64
import json
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from seqmodels.errors import SeqModelsError
from serving.schema import (
    ClassifyResponse,
    ErrorResponse,
    GenerateResponse,
    ModelCard,
    ModelList,
    ScoreResponse,
    TagResponse,
)

Answer = TypeVar("Answer", bound=BaseModel)


class ServiceError(SeqModelsError):
    """The service refused a request or failed. `status` is HTTP's (0 inside a stream); `code` and `param` say more."""

    def __init__(self, status: int, body: Any) -> None:
        try:
            detail = ErrorResponse.model_validate(body).error
        except ValueError:  # an answer from something in between, such as a proxy
            super().__init__(f"status {status}, with no message of the service")
            self.status, self.code, self.param = status, "unknown", None
            return
        super().__init__(detail.message)
        self.status, self.code, self.param = status, detail.code, detail.param


class Client:
    """Asks one service. Not for several threads at once; each may have its own."""

    def __init__(self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout_s: float = 70.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def classify(self, inputs: Any, **options: Any) -> ClassifyResponse:
        return self._ask("classify", ClassifyResponse, inputs, options)

    def tag(self, inputs: Any, **options: Any) -> TagResponse:
        return self._ask("tag", TagResponse, inputs, options)

    def translate(self, inputs: Any, **options: Any) -> GenerateResponse:
        return self._ask("translate", GenerateResponse, inputs, options)

    def caption(self, inputs: Any, **options: Any) -> GenerateResponse:
        return self._ask("caption", GenerateResponse, inputs, options)

    def generate(self, inputs: Any = None, **options: Any) -> GenerateResponse:
        return self._ask("generate", GenerateResponse, inputs, options)

    def score(self, targets: str | list[str], inputs: Any = None, **options: Any) -> ScoreResponse:
        return self._ask("score", ScoreResponse, inputs, {"targets": targets, **options})

    def models(self) -> list[ModelCard]:
        return self._parse(ModelList, self._http.get("/v1/models")).data

    def is_ready(self) -> bool:
        """Whether the service can be reached and is warm."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stream(self, task: str, inputs: Any = None, **options: Any) -> Generator[tuple[int, int, str]]:
        """Text as it is decided: (input, sequence, more text). Closing it early ends the work on the server."""
        body = {**_body(inputs, options), "stream": True}
        with self._http.stream("POST", f"/v1/{task}", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            for event, data in _events(response.iter_lines()):
                if event == "error":
                    raise ServiceError(0, data)
                if event == "delta":
                    yield data["index"], data["sequence"], data["delta"]

    def _ask(self, task: str, shape: type[Answer], inputs: Any, options: Mapping[str, Any]) -> Answer:
        return self._parse(shape, self._http.post(f"/v1/{task}", json=_body(inputs, options)))

    def _parse(self, shape: type[Answer], response: httpx.Response) -> Answer:
        if response.status_code != 200:
            raise _error(response)
        return TypeAdapter(shape).validate_json(response.content)


def _body(inputs: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(options) if inputs is None else {"inputs": _encoded(inputs), **options}


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


def _error(response: httpx.Response) -> ServiceError:
    try:
        return ServiceError(response.status_code, response.json())
    except ValueError:
        return ServiceError(response.status_code, None)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Server-sent events: name and data."""
    name = "message"
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
            name = "message"
