"""The Ray Serve side: one deployment that is its own HTTP ingress, and the builder that `serve run` calls.

A replica loads every model, proves itself warm, and only then takes requests. Counting, bounding and expiring
requests is the app's own work; the limits given to Serve here are a backstop, set a little wider.
"""

from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from seqmodels.pipeline import Pipeline
from seqmodels.shortlist import has_shortlist
from serving.app import build_app
from serving.auth import load_key_hashes
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.runner import Runner

NAME = "ModelServer"
HEALTH_CHECK_PERIOD_S = 5.0


class ModelServer:
    """One replica: its pipelines, the runner that turns them, and the app in front."""

    def __init__(self, fields: dict[str, Any], key_hashes: tuple[str, ...]) -> None:
        self.config = config = ServeConfig.parse(fields)
        self.key_hashes = key_hashes
        torch.set_num_threads(config.num_threads)  # Ray has set OMP_NUM_THREADS to its own idea
        self.pipelines = load_pipelines(config)
        self.runner = Runner(self.pipelines, max_requests=config.max_requests, stall_after_s=config.stall_after_s)
        self.metrics = Metrics()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return build_app(
            self.runner,
            self.config,
            key_hashes=self.key_hashes,
            observe=self.metrics.answered,
        )

    def check_health(self) -> None:
        """Called by Serve every few seconds; a replica that fails it is replaced. The gauges are set here too."""
        if not self.runner.is_turning:
            raise RuntimeError(f"the engine has not turned for {self.config.stall_after_s} s")
        if self.runner.broken_models:
            raise RuntimeError(f"every step fails: {', '.join(self.runner.broken_models)}")
        self.metrics.loaded(self.runner.loads)


def load_pipelines(config: ServeConfig) -> dict[str, Pipeline]:
    """Every model of the service by name. Raises ModelDirectoryError."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        name: Pipeline.from_pretrained(
            directories,
            device,
            config.max_rows,
            config.decoder_weights,
            config.shortlist and any(map(has_shortlist, directories)),
            config.prefix_cache_states,
        )
        for name, directories in config.directories.items()
    }


def build(args: ServeConfig) -> Application:
    """The application, for `python -m serving`, `serve run serving.deployments:build` or a Serve config file.

    Keys are read here, once, and travel to the replicas as hashes.
    """
    options = deployment_options(args)
    server = serve.deployment(serve.ingress()(ModelServer), name=NAME, **options)
    return server.bind(args.model_dump(mode="json"), load_key_hashes(args.api_keys_file))


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """Everything that Ray Serve is told, in its own names."""
    num_gpus = config.num_gpus
    if num_gpus is None:
        wants_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        num_gpus = 1.0 if wants_gpu else 0.0
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * config.max_requests,  # so that our own 429 comes first
        "max_queued_requests": config.max_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": config.num_threads, "num_gpus": num_gpus},
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": config.drain_s + 10.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,  # a model that does not load will not load the twentieth time
        "max_surge_percent": 25,  # the new replica stands before the old one goes
    }
    if config.autoscaling:
        options["autoscaling_config"] = config.autoscaling.model_dump()
    else:
        options["num_replicas"] = config.replicas
    return options
