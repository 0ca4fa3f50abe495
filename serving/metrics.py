"""What the service counts, as Ray Serve's own metric objects: Ray's exporter adds the replica and serves Prometheus.

To be made inside a replica, where Ray knows its name. deploy/grafana.json shows all of it.
"""

from collections.abc import Iterable, Mapping

from ray.serve import metrics

from seqmodels.decoding.request import Times
from serving.guard import Exchange

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
STEP_SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0]


class Metrics:
    """Requests, inputs, steps of engines, and the gauges of each model."""

    def __init__(self) -> None:
        self.requests = metrics.Counter("seqmodels_requests", "Answers, by route and status", ("path", "status"))
        self.errors = metrics.Counter("seqmodels_errors", "Errors told, by their code", ("path", "code"))
        self.seconds = metrics.Histogram(
            "seqmodels_request_seconds", "From arrival to the last byte", SECONDS, ("path",)
        )
        self.tokens = metrics.Counter("seqmodels_tokens", "Tokens read and written", ("model", "direction"))
        self.queue_seconds = metrics.Histogram(
            "seqmodels_queue_seconds", "An input's wait for its turn", SECONDS, ("model",)
        )
        self.first_token_seconds = metrics.Histogram(
            "seqmodels_first_token_seconds",
            "From an input's arrival to its first token, or its label",
            SECONDS,
            ("model",),
        )
        self.token_seconds = metrics.Histogram(
            "seqmodels_token_seconds", "Of a request for text, per token after the first", STEP_SECONDS, ("model",)
        )
        self.step_seconds = metrics.Histogram(
            "seqmodels_step_seconds", "One step of a model's engine", STEP_SECONDS, ("model",)
        )
        self._gauges: dict[str, metrics.Gauge] = {}

    def answered(self, exchange: Exchange) -> None:
        """Count a request that is over."""
        self.requests.inc(tags={"path": exchange.route, "status": str(exchange.status)})
        self.seconds.observe(exchange.seconds, tags={"path": exchange.route})
        if exchange.code:
            self.errors.inc(tags={"path": exchange.route, "code": exchange.code})
        if exchange.model is None:
            return
        for name, count in exchange.usage.items():
            if count:
                self.tokens.inc(count, tags={"model": exchange.model, "direction": name.removesuffix("_tokens")})
        self._timed(exchange.model, exchange.times)
        if per_token := seconds_per_token(exchange.times):
            self.token_seconds.observe(per_token, tags={"model": exchange.model})

    def _timed(self, model: str, inputs: Iterable[Times]) -> None:
        for times in inputs:
            if times.submitted is None:
                continue
            if times.admitted is not None:
                self.queue_seconds.observe(times.admitted - times.submitted, tags={"model": model})
            if times.first_token is not None:
                self.first_token_seconds.observe(times.first_token - times.submitted, tags={"model": model})

    def stepped(self, model: str, seconds: float) -> None:
        """Note one step of a model's engine. Called by the runner's thread."""
        self.step_seconds.observe(seconds, tags={"model": model})

    def loaded(self, loads: Mapping[str, Mapping[str, int]]) -> None:
        """Set a gauge for each figure of each model, such as rows_live."""
        for model, load in loads.items():
            for name, value in load.items():
                if name not in self._gauges:
                    self._gauges[name] = metrics.Gauge(f"seqmodels_{name}", f"{name} of one model", ("model",))
                self._gauges[name].set(value, tags={"model": model})


def seconds_per_token(inputs: Iterable[Times]) -> float | None:
    """What a token after the first took, over all inputs of a request; None where there is none. Outputs of one input
    are written side by side, so the longest counts."""
    written = [times for times in inputs if times.num_tokens > 1 and times.finished is not None]
    if not written:
        return None
    seconds = sum((times.finished or 0.0) - (times.first_token or 0.0) for times in written)
    return seconds / sum(times.num_tokens - 1 for times in written)
