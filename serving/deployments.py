"""The Ray Serve side: one deployment that is its own HTTP ingress, and the builder that `serve run` calls.

A replica loads every model, proves itself warm, and only then takes requests; which models these are is Serve's
`user_config`, so that all replicas, present and future, change them together. Counting, bounding and expiring
requests is the app's own work; the limits given to Serve here are a backstop, set a little wider.
"""

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from seqmodels.errors import ConfigError
from seqmodels.pipeline import Pipeline
from seqmodels.shortlist import has_shortlist
from serving.app import build_app
from serving.auth import ApiKey, load_keys
from serving.autoscaling import METRIC, ByOccupancy, occupancy
from serving.cluster import DEPLOYMENT
from serving.config import ModelSet, Settings
from serving.guard import Exchange
from serving.logs import join_ray, log_request, name_request
from serving.metrics import Metrics
from serving.models import Models, ServedModel
from serving.runner import Runner
from serving.states import load_state_key

if TYPE_CHECKING:
    from serving.traces import Traces

HEALTH_CHECK_PERIOD_S = 5.0
# After each of torch's operations, some hundred in a step, the engine's thread takes the interpreter again, and each
# time may have to wait so long for an event loop that is busy. Python's own 5 ms would make a step ten times as long.
SWITCH_INTERVAL_S = 0.0005


class ModelServer:
    """One replica: its models, the runner that turns them, and the app in front."""

    traces: "Traces | None" = None

    def __init__(self, settings: dict[str, Any], keys: tuple[ApiKey, ...], state_key: bytes) -> None:
        self.settings = Settings.parse(settings)
        self.keys = keys
        self.state_key = state_key
        join_ray()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        torch.set_num_threads(self.settings.num_threads)  # Ray has set OMP_NUM_THREADS to its own idea
        self.metrics = Metrics()
        self.traces = traces_of(self.settings)
        self.runner: Runner[ServedModel] = Runner(
            max_requests=self.settings.max_requests,
            stall_after_s=self.settings.stall_after_s,
            stepped=self.metrics.stepped,
        )
        self.models = Models(self.runner, partial(load_pipeline, self.settings))

    async def reconfigure(self, models: dict[str, Any]) -> None:
        """Called by Serve with `user_config`: after the constructor, before the replica takes requests, and whenever
        it changes. Only the first call may fail; what fails later leaves what is served as it is."""
        try:
            wanted = ModelSet.parse(models)
        except ConfigError as error:
            self.models.refuse(error)
        else:
            await asyncio.to_thread(self.models.apply, wanted)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return build_app(
            self.models, self.settings, keys=self.keys, state_key=self.state_key, begin=name_request,
            observe=self._answered,
        )  # fmt: skip

    def _answered(self, exchange: Exchange) -> None:
        self.metrics.answered(exchange)
        if self.traces:
            self.traces.answered(exchange)
        if self.settings.access_log:
            log_request(exchange)

    def __del__(self) -> None:
        """Called by Serve when the replica ends, which does not end as a program does."""
        if self.traces:
            self.traces.end()

    def check_health(self) -> None:
        """Called by Serve every few seconds; a replica that fails it is replaced. The gauges are set here too."""
        if not self.models.served:
            raise RuntimeError("no model is served; the deployment's user_config must name at least one")
        if not self.runner.is_turning:
            raise RuntimeError(f"the engine has not turned for {self.settings.stall_after_s} s")
        if self.runner.broken_models:
            raise RuntimeError(f"every step fails: {', '.join(self.runner.broken_models)}")
        self.metrics.loaded(self._loads())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where replicas are scaled."""
        of_each = (occupancy(model.load, model.pace.share) for model in self.models.served.values())
        return {METRIC: max(of_each, default=0.0)}

    def _loads(self) -> dict[str, dict[str, int]]:
        return {name: model.load for name, model in self.models.served.items()}

    def report(self) -> dict[str, Any]:
        """What this replica serves, for `python -m serving swap`, which asks every one."""
        return self.models.report()


def traces_of(settings: Settings) -> "Traces | None":
    if settings.tracing is None:
        return None
    from serving.traces import Traces  # and with it much that nobody else needs

    return Traces(settings.tracing)


def load_pipeline(settings: Settings, directories: list[str]) -> Pipeline:
    """One model. Raises ModelDirectoryError, and ConfigError where those of an ensemble do not fit together."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Pipeline.from_pretrained(
        directories,
        device,
        settings.max_rows,
        settings.decoder_weights,
        settings.shortlist and any(map(has_shortlist, directories)),
        settings.prefix_cache_states,
    )


def build(args: Settings) -> Application:
    """The application, called by Serve for a configuration that names `serving.deployments:build`.

    Keys are read here, once, and travel to the replicas: API keys as hashes. Which models are served is no part of it,
    but the deployment's `user_config` in that configuration (a `ModelSet`): so that they can change and all else go on.
    """
    server = serve.deployment(serve.ingress()(ModelServer), name=DEPLOYMENT, **deployment_options(args))
    return server.bind(args.model_dump(mode="json"), load_keys(args.api_keys_file), load_state_key(args.state_key_file))


def deployment_options(settings: Settings) -> dict[str, Any]:
    """Everything that Ray Serve is told, in its own names."""
    num_gpus = settings.num_gpus
    if num_gpus is None:
        wants_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        num_gpus = 1.0 if wants_gpu else 0.0
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * settings.max_requests,  # so that our own 429 comes first
        "max_queued_requests": settings.max_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": settings.num_threads, "num_gpus": num_gpus},
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": settings.drain_s + 10.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,  # a model that does not load will not load the twentieth time
        "max_surge_percent": 25,  # the new replica stands before the old one goes
    }
    if settings.autoscaling:
        options["autoscaling_config"] = {
            "min_replicas": settings.autoscaling.min_replicas,
            "max_replicas": settings.autoscaling.max_replicas,
            "upscale_delay_s": settings.autoscaling.upscale_delay_s,
            "downscale_delay_s": settings.autoscaling.downscale_delay_s,
            "policy": {
                "policy_function": ByOccupancy,
                "policy_kwargs": {"target": settings.autoscaling.target_occupancy},
            },
        }
    else:
        options["num_replicas"] = settings.replicas
    return options
