"""What the service counts, as Ray Serve's own metric objects: Ray's exporter adds the replica and serves Prometheus.

To be made inside a replica, where Ray knows its name.
"""

from collections.abc import Mapping

from ray.serve import metrics

from serving.http import Exchange

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


class Metrics:
    """Requests by route and status, their seconds, and the gauges of each model."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("seqmodels_requests", "Answers, by route and status", ("path", "status"))
        self._seconds = metrics.Histogram(
            "seqmodels_request_seconds", "From arrival to the last byte", SECONDS, ("path",)
        )
        self._gauges: dict[str, metrics.Gauge] = {}

    def answered(self, exchange: Exchange) -> None:
        self._requests.inc(tags={"path": exchange.route, "status": str(exchange.status)})
        self._seconds.observe(exchange.seconds, tags={"path": exchange.route})

    def loaded(self, loads: Mapping[str, Mapping[str, int]]) -> None:
        """Set a gauge for each figure of each model, such as rows_live."""
        for model, load in loads.items():
            for name, value in load.items():
                if name not in self._gauges:
                    self._gauges[name] = metrics.Gauge(f"seqmodels_{name}", f"{name} of one model", ("model",))
                self._gauges[name].set(value, tags={"model": model})
