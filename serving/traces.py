"""Traces: a span for each request, in the trace that its client names, and one for each of its inputs.

By OpenTelemetry, to the exporter of the settings; without them this file is not even imported. Ray's own tracing is not
used, for its proxy does not go on with the client's trace, and FastAPI's neither, for it tells paths and queries as
clients sent them. A span never holds a text, a picture, an answer, a path, a query or a key, and of an id that a client
gave only what has the form of one.
"""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from seqmodels.decoding.request import Times
from seqmodels.errors import ConfigError
from serving.config import Tracing
from serving.guard import WITHOUT_KEY, Exchange


class Traces:
    """Tells of requests that are over, from a thread of its own."""

    def __init__(self, tracing: Tracing) -> None:
        """Raises ConfigError where there is no such exporter."""
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(tracing.sampling_ratio),
            resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "seqmodels")}),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter_of(tracing)()))
        self._tracer = self._provider.get_tracer("seqmodels")

    def answered(self, exchange: Exchange) -> None:
        """Note a request that is over; those for health, every few seconds, would hide the others."""
        if exchange.route in WITHOUT_KEY:
            return
        now, now_ns = time.monotonic(), time.time_ns()

        def moment(at: float) -> int:
            return now_ns - round((now - at) * 1e9)

        trace = TraceContextTextMapPropagator().extract({"traceparent": exchange.traceparent or ""})
        request = self._tracer.start_span(
            exchange.route, trace, SpanKind.SERVER, _known(about(exchange)), start_time=moment(now - exchange.seconds)
        )
        for times in exchange.times if request.is_recording() else []:
            if times.submitted is not None:
                within = set_span_in_context(request)
                attributes = _known(about_input(times))
                one = self._tracer.start_span(
                    "input", within, attributes=attributes, start_time=moment(times.submitted)
                )
                one.end(moment(now if times.finished is None else times.finished))
        if exchange.status >= 500:
            request.set_status(StatusCode.ERROR)
        request.end(now_ns)

    def end(self) -> None:
        """Send what waits to be sent."""
        self._provider.shutdown()


def exporter_of(tracing: Tracing) -> Callable[[], SpanExporter]:
    """Raises ConfigError where it cannot be imported."""
    module, _, name = tracing.exporter.partition(":")
    try:
        exporter: Callable[[], SpanExporter] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"tracing.exporter is {tracing.exporter!r}, which cannot be imported: {error}; OTLP's own comes with the "
            "extra `trace`"
        ) from None
    return exporter


def about(exchange: Exchange) -> dict[str, Any]:
    """By the names of OpenTelemetry's conventions where they have one."""
    return {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "error.type": exchange.code,
        "seqmodels.request_id": exchange.request_id,
        "seqmodels.model": exchange.model,
        "seqmodels.revision": exchange.revision,
        "seqmodels.first_byte_s": exchange.first_byte_s,
        **{f"seqmodels.{name}": count for name, count in exchange.usage.items()},
    }


def about_input(times: Times) -> dict[str, Any]:
    """Seconds from its arrival until it had its turn, and until its first token, or its label."""
    return {
        f"seqmodels.{name}": None if until is None or times.submitted is None else until - times.submitted
        for name, until in (("queue_s", times.admitted), ("first_token_s", times.first_token))
    }


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
