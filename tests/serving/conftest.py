"""The app with fake pipelines, in this process: a loop in a thread, the app's lifespan, and a client that waits."""

import asyncio
import base64
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serving.app import build_app
from serving.auth import ApiKey, hash_key
from serving.config import ServeConfig
from serving.models import Models, ServedModel
from serving.runner import Runner

from .events import events
from .fakes import FakePipeline, all_fakes, png
from .model_directories import save_all

PNG = base64.b64encode(png()).decode()
INPUTS = {
    "/v1/classify": "a good day",
    "/v1/tag": "a good day",
    "/v1/translate": "a good day",
    "/v1/caption": {"image": PNG},
    "/v1/generate": "a good day",
}
TEXTS = [path for path in INPUTS if path not in ("/v1/classify", "/v1/tag")]


class InProcess:
    """An app that runs, and a client that speaks to it without a socket."""

    def __init__(self, app: FastAPI, models: Models) -> None:
        self.app = app
        self.models = models
        self.runner = models.runner
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.headers: dict[str, str] = {}

    @property
    def pipelines(self) -> dict[str, Any]:
        """Those that are served now."""
        return {name: model.pipeline for name, model in self.models.served.items()}

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    @contextmanager
    def running(self) -> Iterator["InProcess"]:
        lifespan = self.app.router.lifespan_context(self.app)
        self.wait(lifespan.__aenter__())
        try:
            yield self
        finally:
            for pipeline in self.pipelines.values():
                if isinstance(pipeline, FakePipeline):
                    pipeline.gate.set()
            self.wait(lifespan.__aexit__(None, None, None))
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        response: httpx.Response = self.wait(self.send(method, path, **kwargs))
        return response

    async def send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=self.headers) as client:
            return await client.request(method, path, timeout=60, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)


def api_key(key: str, **fields: Any) -> ApiKey:
    return ApiKey(sha256=hash_key(key), name=hash_key(key)[:8]).model_copy(update=fields)


STATE_KEY = b"a key of tests alone"


def app_over(pipelines: Mapping[str, Any], keys: tuple[ApiKey, ...] = (), **fields: Any) -> tuple[FastAPI, Models]:
    """An app that serves these pipelines; fields: of its ServeConfig."""
    wanted = dict(pipelines)
    config = ServeConfig.parse({"models": {name: name for name in wanted}, "drain_s": 1.0, **fields})
    runner: Runner[ServedModel] = Runner(max_requests=config.max_requests, stall_after_s=config.stall_after_s)
    models = Models(runner, lambda directories: wanted[directories[0]])
    models.apply(config.model_set)
    return build_app(models, config.settings, keys=keys, state_key=STATE_KEY), models


@contextmanager
def in_process(
    pipelines: Mapping[str, Any] | None = None, keys: tuple[ApiKey, ...] = (), **fields: Any
) -> Iterator[InProcess]:
    """The same, running; over fakes where no pipelines are given."""
    app, models = app_over(pipelines or all_fakes(), keys, **fields)
    with InProcess(app, models).running() as server:
        yield server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> directory of a small real model for each task."""
    return save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server() -> Iterator[InProcess]:
    with in_process() as running:
        yield running


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx.Response) -> list[tuple[str | None, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.content)
