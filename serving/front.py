"""Front: from an HTTP request to work for the service, and from its answer to an HTTP response.

All endpoints go the same way: read the body with a bound, parse and prepare it in the pool, hand it to the runner,
then wait for the answer, or stream it, while watching whether the client leaves.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from seqmodels.errors import QueueFullError
from serving import intake, schema
from serving.batch import BatchResponse
from serving.completions import CompletionRequest, CompletionWriter
from serving.config import Limits
from serving.errors import HttpError, http_error, invalid_request
from serving.guard import Exchange, exchange_of, priority_of
from serving.http import (
    EventStream,
    as_json,
    as_long_json,
    read_body,
    seconds_allowed,
    server_sent_event,
    unless_client_leaves,
)
from serving.models import Models, ServedModel
from serving.service import Answer, Call, Delta, Service, Work, ending_at

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed", bound=BaseModel)
Body = TypeVar("Body", bound=schema.Request | CompletionRequest)
Read = Callable[[bytes], Body]
Prepare = Callable[[ServedModel, Body, intake.Terms], Work]

GENERATORS = ("translate", "caption", "generate")
TASKS = {
    "/v1/classify": ("classify",),
    "/v1/tag": ("tag",),
    "/v1/translate": ("translate",),
    "/v1/caption": ("caption",),
    "/v1/generate": ("generate",),
    "/v1/score": GENERATORS,
    "/v1/completions": GENERATORS,
}
LINES = ("application/x-ndjson", "application/jsonl", "application/jsonlines")
# For so long requests like one that was refused are taken to be refused too: until it would have been in time, and at
# least for a share of the time that it allows, which a queue is about as long as.
LEAST_ALIKE = 0.05
MOST_ALIKE_S = 0.05
DONE = b"data: [DONE]\n\n"


class Front:
    """The way of every kind of endpoint through the service."""

    def __init__(self, service: Service, models: Models, limits: Limits) -> None:
        self.service = service
        self.models = models
        self.limits = limits
        self._batches = asyncio.Semaphore(limits.batches)

    def admit(self, request: Request) -> None:
        """Before a request is routed, let alone read: refuse one that no model of its endpoint can answer in time.
        Raises QueueFullError, ClosingError, and HttpError for a wrong header."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if request.method == "POST" and (tasks := TASKS.get(path)):
            exchange_of(request).route = path  # for logs and metrics, where it gets no further
            terms = self._terms(request)
            allowed_s = terms.deadline - time.monotonic()
            try:
                self.service.runner.check_time(self.models.of_tasks(tasks), terms, self.service.preparing.seconds)
            except QueueFullError as error:
                told = http_error(error)
                alike_s = min(MOST_ALIKE_S, max(LEAST_ALIKE * allowed_s, error.retry_after_s))
                told.headers["x-refused-alike"] = str(round(1000 * alike_s))  # for haproxy.sh, in ms
                raise told from None

    async def answer(self, request: Request, shape: type[intake.TaskRequest], task: str) -> Response:
        """An endpoint whose `inputs` go to a model of one task."""
        read = partial(_parse_json, shape, _content_type(request))
        return await self._answer(request, read, task)

    async def caption_image(self, request: Request) -> Response:
        """A picture as the whole body, with the options in the query string."""
        read = partial(_parse_image, request.query_params.multi_items())
        return await self._answer(request, read, "caption")

    async def score(self, request: Request) -> Response:
        """The probability of given targets, from any model that writes text."""
        read = partial(_parse_json, schema.ScoreRequest, _content_type(request))
        _, work = await self._prepare(request, read, GENERATORS, intake.prepare_score)
        return await self._response(await _wait(request, self.service.call(work)))

    async def complete(self, request: Request) -> Response:
        """Text in OpenAI's words, from any model that writes text."""
        read = partial(_parse_json, CompletionRequest, _content_type(request))
        body, work = await self._prepare(request, read, GENERATORS, intake.prepare_completion)
        writer = CompletionWriter(work.model.name, work.model.revision, body)
        # Two calls, so that a stream can tell all of the prompts before it tells what comes after them.
        num_scored = len(body.prompts) if body.scores_prompts else 0
        with contextlib.ExitStack() as held:
            scoring, writing = (
                held.enter_context(contextlib.closing(self.service.call(replace(work, jobs=jobs))))
                for jobs in (work.jobs[:num_scored], work.jobs[num_scored:])
            )
            exchange = exchange_of(request)
            if body.stream:
                chunks = _chunks(scoring, writing, writer, exchange)
                return EventStream(_completion_events(chunks, exchange), held.pop_all().close)
            completion = _completion(scoring, writing, writer, exchange)
            return await self._json(*await unless_client_leaves(request.receive, completion))

    async def batch(self, app: ASGIApp, request: Request) -> Response:
        """Many requests in one, each of them to `app`."""
        if _content_type(request) not in LINES:
            message = f"the content type is none of {', '.join(LINES)}; send a line of JSON for each request"
            raise HttpError(415, message, "unsupported_media_type")
        return BatchResponse(app, request, self.limits, self._batches)

    async def _answer(self, request: Request, read: Read[intake.TaskRequest], task: str) -> Response:
        body, work = await self._prepare(request, read, (task,), intake.prepare_inputs)
        call = self.service.call(work)
        if isinstance(body, schema.GeneratorOptions) and body.stream:
            return EventStream(_events(call, exchange_of(request), self.service), call.close)
        return await self._response(await _wait(request, call))

    async def _response(self, answer: Answer) -> Response:
        return await self._json(answer.body(), answer.is_long)

    async def _json(self, body: dict[str, Any], is_long: bool) -> Response:
        text = await self.service.in_pool(as_long_json, body) if is_long else as_json(body)
        return Response(text, media_type="application/json")

    async def _prepare(
        self, request: Request, read: Read[Body], tasks: tuple[str, ...], prepare: Prepare[Body]
    ) -> tuple[Body, Work]:
        """From bytes to jobs; whatever is the client's fault comes to light here.

        The place is held until just before `Service.call`, with no await between, so that nobody gets in first.
        """
        exchange, terms = exchange_of(request), self._terms(request)

        def in_pool(data: bytes) -> tuple[Body, Work]:
            body = read(data)
            return body, prepare(self.models.find(body.model, tasks), body, terms)

        with self.service.runner.place():
            async with ending_at(terms.deadline):
                data = await read_body(request, self.limits.body_bytes)
                coming = self.service.runner.on_the_way(self.models.of_tasks(tasks), terms)
                with self.service.preparing.one(), coming:
                    body, work = await self.service.in_pool(in_pool, data)
        exchange.model, exchange.revision = work.model.name, work.model.revision
        exchange.times = [job.request.times for job in work.jobs]
        return body, work

    def _terms(self, request: Request) -> intake.Terms:
        """Raises HttpError for a wrong header."""
        return intake.Terms(
            self.limits,
            self.service.seal,
            deadline=time.monotonic() + seconds_allowed(request, self.limits.timeout_s),
            priority=priority_of(request),
            client=exchange_of(request).key.name,
        )


def is_image(request: Request) -> bool:
    return _content_type(request).startswith("image/")


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _parse_json(shape: type[Parsed], content_type: str, data: bytes) -> Parsed:
    if content_type != "application/json":
        message = "the content type is not application/json; send JSON and say so in the header Content-Type"
        raise HttpError(415, message, "unsupported_media_type")
    try:
        return shape.model_validate_json(data)
    except ValidationError as error:
        raise invalid_request(error) from None


def _parse_image(query: Sequence[tuple[str, str]], data: bytes) -> schema.RawCaptionRequest:
    try:
        lists = {name: tuple(text for other, text in query if other == name) for name in schema.LISTS}
        single = [(name, text) for name, text in query if name not in schema.LISTS]
        options = schema.GeneratorOptions.model_validate_strings(dict(single))
        for name, count in Counter(name for name, _ in single).items():  # now all are fields of ours
            if count > 1:
                raise HttpError(400, f"{name} is given {count} times; give it once", "invalid_value", name)
        given = options.model_dump(exclude_unset=True) | {name: texts for name, texts in lists.items() if texts}
        return schema.RawCaptionRequest(inputs=data, **given)
    except ValidationError as error:
        raise invalid_request(error) from None


async def _wait(request: Request, call: Call) -> Answer:
    with contextlib.closing(call):
        answer = await unless_client_leaves(request.receive, call.answer())
    exchange_of(request).usage = answer.usage
    return answer


async def _events(call: Call, exchange: Exchange, service: Service) -> AsyncGenerator[bytes]:
    """`delta` events, then one `answer` event; an `error` event in place of what could not be done."""
    try:
        async for piece in call.stream():
            if isinstance(piece, Answer):
                exchange.usage = piece.usage
                if piece.is_long:
                    yield await service.in_pool(server_sent_event, piece.body(), "answer", as_long_json)
                else:
                    yield server_sent_event(piece.body(), "answer")
            elif piece.text:
                delta = {"index": piece.index, "sequence": piece.sequence, "delta": piece.text}
                yield server_sent_event(delta, "delta")
    except Exception as error:
        yield server_sent_event(_stream_error(error, exchange), "error")


async def _completion(
    scoring: Call, writing: Call, writer: CompletionWriter, exchange: Exchange
) -> tuple[dict[str, Any], bool]:
    """The answer, and whether it is long."""
    scored, written = await scoring.answer(), await writing.answer()
    exchange.usage = _usage(scored, written)
    return writer.answer(scored.results, written.results, exchange.usage), scored.is_long or written.is_long


async def _completion_events(chunks: AsyncGenerator[dict[str, Any]], exchange: Exchange) -> AsyncGenerator[bytes]:
    """Chunks in OpenAI's words, then [DONE]."""
    try:
        async for chunk in chunks:
            yield server_sent_event(chunk)
    except Exception as error:
        yield server_sent_event(_stream_error(error, exchange))
    yield DONE


async def _chunks(
    scoring: Call, writing: Call, writer: CompletionWriter, exchange: Exchange
) -> AsyncGenerator[dict[str, Any]]:
    scored = await scoring.answer()
    for chunk in writer.echo(scored.results):
        yield chunk
    async for piece in writing.stream():
        if isinstance(piece, Delta):
            chunks = writer.delta(piece.index, piece.sequence, piece.text, piece.told)
        else:
            exchange.usage = _usage(scored, piece)
            chunks = writer.finish(piece.results, exchange.usage)
        for chunk in chunks:
            yield chunk


def _usage(scored: Answer, written: Answer) -> dict[str, int]:
    """A prompt that is scored and gone on from is read twice, and counts once."""
    return written.usage if written.results else scored.usage


def _stream_error(error: Exception, exchange: Exchange) -> dict[str, dict[str, str | None]]:
    told = http_error(error)
    exchange.code = told.code
    if told.status == 500:
        logger.error("a stream broke off", exc_info=error)
    return told.body
