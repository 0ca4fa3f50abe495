"""Clients: the service from Python, with typed answers.

    with Client("http://127.0.0.1:8000") as client:
        client.translate(["A dog runs."], num_beams=5).results[0].sequences[0].text

    async with AsyncClient("http://127.0.0.1:8000") as client:
        (await client.translate(["A dog runs."], num_beams=5)).results[0].sequences[0].text

Both have the same methods. Inputs are what the service takes; pictures may be given as bytes. Options are the fields of
serving/schema.py, and `timeout_s` and `priority` of one request in place of the client's. All raise ServiceError, and
InputError for what cannot be sent. What is asked again, and when, is in serving/questions.py.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx

from seqmodels.errors import InputError
from serving import questions
from serving.http import PRIORITY_HEADER
from serving.questions import Asking, Delta, Question, ServiceError

__all__ = ["AsyncClient", "Client", "Delta", "ServiceError"]

P = ParamSpec("P")
T = TypeVar("T")


class _Asks(Generic[P, T]):
    """A method that asks one question for one answer."""

    def __init__(self, build: Callable[P, Question[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Question[T]]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: "Client | AsyncClient | None", owner: type) -> Callable[P, Any]:
        return _method(self._build, None if client is None else client._ask)


class _Streams(Generic[P, T]):
    """A method that asks questions in turn and gives their answers part by part."""

    def __init__(self, build: Callable[P, Iterable[Question[T]]]) -> None:
        self._build = build

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Iterable[Question[T]]]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[P, Generator[T]]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[P, AsyncGenerator[T]]: ...
    def __get__(self, client: "Client | AsyncClient | None", owner: type) -> Callable[P, Any]:
        return _method(self._build, None if client is None else client._parts)


def _method(build: Callable[P, Any], run: Callable[[Any], Any] | None) -> Callable[P, Any]:
    """`build`, and `run` on what it gives; `build` alone, for who reads its help, where there is no client."""
    if run is None:
        return build

    @functools.wraps(build)
    def method(*args: P.args, **kwargs: P.kwargs) -> Any:
        return run(build(*args, **kwargs))

    return method


class _Methods:
    """What both clients can be asked."""

    classify = _Asks(questions.classify)
    tag = _Asks(questions.tag)
    translate = _Asks(questions.translate)
    caption = _Asks(questions.caption)
    generate = _Asks(questions.generate)
    score = _Asks(questions.score)
    models = _Asks(questions.models)
    stream = _Streams(questions.stream)
    batch = _Streams(questions.batch)

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        timeout_s: float = 70.0,
        priority: str | None = None,
    ) -> None:
        """timeout_s: how long to wait for an answer, which the server is told. priority: low, normal or high; the
        server's usual one where it is None. Raises InputError for what cannot be sent."""
        key, urgency = questions.checked_header(api_key, "api_key"), questions.checked_header(priority, "priority")
        given = {"authorization": key and f"Bearer {key}", PRIORITY_HEADER: urgency}
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"url is {url!r}: {error}; give one such as http://127.0.0.1:8000", param="url") from None
        self._url = url
        self._timeout_s = questions.checked_timeout(timeout_s)
        self._headers = {name: value for name, value in given.items() if value}


class Client(_Methods):
    """Asks one service. Not for several threads at once; each may have its own."""

    @functools.cached_property
    def _http(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, headers=self._headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        """Whether the service can be reached and is warm."""
        try:
            return self._ask(questions.ready())
        except ServiceError:
            return False

    def _ask(self, question: Question[T]) -> T:
        (answer,) = self._parts([question])
        return answer

    def _parts(self, asked: Iterable[Question[T]]) -> Generator[T]:
        for question in asked:
            yield from self._run(Asking(question, self._url, self._timeout_s))

    def _run(self, asking: Asking[T]) -> Generator[T]:
        while True:
            try:
                with self._http.stream(**asking.request()) as response:
                    asking.begin(response)
                    for chunk in response.iter_bytes():
                        yield from asking.read(chunk)
                    yield from asking.end()
                return
            except (httpx.HTTPError, ServiceError) as error:
                pause_s = asking.pause_after(error)
            time.sleep(pause_s)


class AsyncClient(_Methods):
    """Asks one service from one event loop, with any number of requests at a time. Who leaves a stream or a batch
    before its end closes it: `async with contextlib.aclosing(client.stream(...)) as pieces`."""

    @functools.cached_property
    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, limits=httpx.Limits(max_connections=None))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def is_ready(self) -> bool:
        """Whether the service can be reached and is warm."""
        try:
            return await self._ask(questions.ready())
        except ServiceError:
            return False

    async def _ask(self, question: Question[T]) -> T:
        (answer,) = [part async for part in self._parts([question])]
        return answer

    async def _parts(self, asked: Iterable[Question[T]]) -> AsyncGenerator[T]:
        for question in asked:
            async with contextlib.aclosing(self._run(Asking(question, self._url, self._timeout_s))) as parts:
                async for part in parts:
                    yield part

    async def _run(self, asking: Asking[T]) -> AsyncGenerator[T]:
        while True:
            try:
                async with self._http.stream(**asking.request()) as response:
                    asking.begin(response)
                    async for chunk in response.aiter_bytes():
                        for part in asking.read(chunk):
                            yield part
                    for part in asking.end():
                        yield part
                return
            except (httpx.HTTPError, ServiceError) as error:
                pause_s = asking.pause_after(error)
            await asyncio.sleep(pause_s)
