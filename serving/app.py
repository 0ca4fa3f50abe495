"""The routes of the service. Each one says what it takes, what it gives, and hands over to `Service`.

Bodies are read with a bound and parsed by pydantic straight from bytes, in a pool thread: so a body that is too large,
too deep, not UTF-8, or holds NaN or half a surrogate pair never reaches anything that could stumble over it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from serving import schema
from serving.auth import PRIORITIES, ApiKey
from serving.batch import BatchLine
from serving.completions import CompletionRequest, CompletionResponse
from serving.config import Settings
from serving.errors import HttpError
from serving.front import LINES, Front, is_image
from serving.guard import Guard, Observe, router_error
from serving.http import PRIORITY_HEADER, TIMEOUT_HEADER
from serving.models import Models, ServedModel
from serving.rates import Rates
from serving.service import Service
from serving.states import Seal, this_place

REFERENCE = "#/components/schemas/{model}"
REQUESTS: tuple[type[BaseModel], ...] = (
    schema.ClassifyRequest,
    schema.TagRequest,
    schema.TranslateRequest,
    schema.CaptionRequest,
    schema.GenerateRequest,
    schema.ScoreRequest,
    CompletionRequest,
    BatchLine,
)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": description}
    for status, description in {
        400: "A field is wrong, or above this server's limit",
        401: "The key is missing or unknown",
        403: "The key does not allow this priority",
        404: "No such model",
        408: "The deadline passed before the answer was ready",
        413: "The input or the body is too long",
        415: "The content type, or this kind of input, is not taken here",
        421: "This server is not known by the name in the header Host",
        422: "The input is empty",
        429: "The queue is full, or the key has asked too often; try again after the seconds in Retry-After",
        500: "A fault of the server",
        503: "The server is not ready, or shutting down",
    }.items()
}


HEADERS = [
    {"name": name, "in": "header", "required": False, "description": description, "schema": values}
    for name, description, values in (
        (TIMEOUT_HEADER, "An answer later than this is of no use", {"type": "number", "exclusiveMinimum": 0}),
        (
            PRIORITY_HEADER,
            "Whose turn comes first, as far as the key allows",
            {"type": "string", "enum": [*PRIORITIES]},
        ),
    )
]


def build_app(
    models: Models,
    settings: Settings,
    *,
    state_key: bytes,
    keys: Sequence[ApiKey] = (),
    begin: Observe = lambda exchange: None,
    observe: Observe = lambda exchange: None,
) -> FastAPI:
    """The service as an ASGI app, which starts the models' runner with its lifespan and drains it at the end.

    state_key: signs the states that clients hold; the same in all replicas. begin, observe: called once per request,
    before all else and after its answer.
    """
    runner = models.runner
    seal = Seal(state_key, settings.state_lifetime_s, this_place(settings.device))
    service = Service(runner, seal, settings.stream_interval_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop(settings.drain_s)

    summary = "Recurrent sequence models over HTTP"
    # Its page loads nothing from elsewhere: the service is also for machines without a way out.
    # And FastAPI's own traces and logs, which an OpenTelemetry in the environment would begin, tell what clients sent.
    silent = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPIOffline(
        title="seqmodels", summary=summary, redoc_url=None, lifespan=lifespan, telemetry=silent, redirect_slashes=False
    )
    rates = Rates(settings.requests_per_minute, settings.most_replicas)
    front = Front(service, models, settings.limits)
    app.add_middleware(
        Guard, keys=keys, rates=rates, hosts=settings.allowed_hosts, begin=begin, admit=front.admit, observe=observe
    )
    if settings.cors_origins:  # around the guard, for a browser asks without a key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id"],
        )
    app.add_exception_handler(HTTPException, router_error)

    @app.post("/v1/classify", **_documented(schema.ClassifyRequest, schema.ClassifyResponse))
    async def classify(request: Request) -> Response:
        """One label for each input, with the probability of every label; or several labels, or numbers, where the
        model's `problem_type` is `multi_label_classification` or `regression`."""
        return await front.answer(request, schema.ClassifyRequest, "classify")

    @app.post("/v1/tag", **_documented(schema.TagRequest, schema.TagResponse))
    async def tag(request: Request) -> Response:
        """Labelled spans of each input, with offsets in characters of the given text."""
        return await front.answer(request, schema.TagRequest, "tag")

    @app.post("/v1/translate", **_documented(schema.TranslateRequest, schema.GenerateResponse, streams=True))
    async def translate(request: Request) -> Response:
        """Text to text. With `stream: true`: `delta` events, then one `answer` event."""
        return await front.answer(request, schema.TranslateRequest, "translate")

    @app.post("/v1/caption", **_documented(schema.CaptionRequest, schema.GenerateResponse, streams=True, images=True))
    async def caption(request: Request) -> Response:
        """A text about each picture, clip or series. Also takes one raw picture, with options in the query."""
        if is_image(request):
            return await front.caption_image(request)
        return await front.answer(request, schema.CaptionRequest, "caption")

    @app.post("/v1/generate", **_documented(schema.GenerateRequest, schema.GenerateResponse, streams=True))
    async def generate(request: Request) -> Response:
        """Text from a language model, going on from each input or, without one, freely."""
        return await front.answer(request, schema.GenerateRequest, "generate")

    @app.post("/v1/score", **_documented(schema.ScoreRequest, schema.ScoreResponse))
    async def score(request: Request) -> Response:
        """The model's own log-probability of each target, token by token."""
        return await front.score(request)

    @app.post("/v1/completions", **_documented(CompletionRequest, CompletionResponse, streams=True))
    async def completions(request: Request) -> Response:
        """Completions as OpenAI's clients expect them, from any model that writes text."""
        return await front.complete(request)

    @app.post("/v1/batch", **_documented(BatchLine, None, media_type=LINES[0]))
    async def batch(request: Request) -> Response:
        """Many requests in one, a line of JSON each; their answers, line by line in the same order, while later lines
        are still being read. `x-request-timeout-seconds` is of the whole."""
        return await front.batch(app, request)

    @app.get("/v1/models", response_model=schema.ModelList, responses=ERRORS)
    async def list_models() -> Response:
        """The models served here, and what was wanted in their place and could not be served."""
        cards = [card(model) for model in models.served.values()]
        return JSONResponse({"object": "list", "data": cards, "refused": list(models.refused)})

    @app.get("/v1/models/{name}", response_model=schema.ModelCard, responses=ERRORS)
    async def one_model(name: str) -> Response:
        """One of the models served here, by its name or an alias."""
        model = models.served.get(models.aliases.get(name, name))
        if model is None:
            message = f"no model of that name is served here; models: {', '.join(models.served)}"
            raise HttpError(404, message, "model_not_found", "model")
        return JSONResponse(card(model))

    def card(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "local",
            "task": model.task,
            "input": model.pipeline.config.input,
            "revision": model.revision,
            "aliases": [alias for alias, name in models.aliases.items() if name == model.name],
        }

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process is alive."""
        return JSONResponse({"alive": True})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"description": "The engine does not turn, or a model is broken"}})
    async def readyz() -> Response:
        """Whether every model is warm and the engine turns, with what it is doing."""
        report = {
            "ready": runner.is_turning and not runner.broken_models,
            "turning": runner.is_turning,
            "broken_models": runner.broken_models,
            "requests": runner.num_open,
            "num_threads": torch.get_num_threads(),
            "models": {name: readiness(model) for name, model in models.served.items()},
            "refused": list(models.refused),
        }
        return JSONResponse(report, 200 if report["ready"] else 503)

    def readiness(model: ServedModel) -> dict[str, Any]:
        return {"revision": model.revision, **model.load, **model.pipeline.facts}

    _document_requests(app, bool(keys))
    return app


def _documented(
    request: type[BaseModel],
    response: type[BaseModel] | None,
    *,
    streams: bool = False,
    images: bool = False,
    media_type: str = "application/json",
) -> dict[str, Any]:
    """What /docs says of an endpoint that reads its body itself. response: None where it is not JSON."""
    content: dict[str, Any] = {media_type: {"schema": {"$ref": REFERENCE.format(model=request.__name__)}}}
    if images:
        content["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    success: dict[str, Any] = {"model": response} if response else {"content": {media_type: {}}}
    if streams:
        success["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "responses": {200: success, **ERRORS},
        "openapi_extra": {"requestBody": {"required": True, "content": content}, "parameters": HEADERS},
    }


def _document_requests(app: FastAPI, asks_for_keys: bool) -> None:
    """Add the request models to the OpenAPI description, where FastAPI has put the response models alone, and that
    there are keys."""
    _, definitions = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REFERENCE)
    document = app.openapi()
    document["components"]["schemas"].update(definitions["$defs"])
    if asks_for_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
