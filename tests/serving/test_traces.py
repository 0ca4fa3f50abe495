"""What is traced of a request, and that nothing else traces it."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from seqmodels.decoding.request import Times
from seqmodels.errors import ConfigError
from serving.config import Settings, Tracing
from serving.deployments import traces_of
from serving.guard import Exchange
from serving.traces import Traces

from .conftest import InProcess, in_process

MEMORY = InMemorySpanExporter()
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"


def remember() -> InMemorySpanExporter:
    return MEMORY


def told(exchange: Exchange, sampling_ratio: float = 1.0) -> list[ReadableSpan]:
    MEMORY.clear()
    traces = Traces(Tracing(exporter=f"{__name__}:remember", sampling_ratio=sampling_ratio))
    traces.answered(exchange)
    traces.end()
    MEMORY._stopped = False  # for the next one
    return list(MEMORY.get_finished_spans())


def asked(traceparent: str | None = None, route: str = "/v1/tag", status: int = 200) -> Exchange:
    return Exchange("id", "POST", traceparent, route=route, status=status, seconds=2.0)


def test_a_request_and_its_inputs() -> None:
    exchange = asked(SAMPLED)
    exchange.model, exchange.revision, exchange.usage = "names", "r1", {"input_tokens": 7}
    exchange.times = [Times(10.0, 10.5, 11.0, 11.5), Times()]  # the second was never submitted
    one, request = told(exchange)
    assert request.parent and request.context and one.parent
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, CALLER)
    assert one.parent.span_id == request.context.span_id and request.kind == SpanKind.SERVER
    assert request.end_time and request.start_time and request.end_time - request.start_time == pytest.approx(2e9)
    assert one.end_time and one.start_time and one.end_time - one.start_time == pytest.approx(1.5e9)
    assert dict(one.attributes or {}) == {"seqmodels.queue_s": 0.5, "seqmodels.first_token_s": 1.0}
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST", "http.route": "/v1/tag", "http.response.status_code": 200,
        "seqmodels.request_id": "id", "seqmodels.model": "names", "seqmodels.revision": "r1",
        "seqmodels.input_tokens": 7,
    }  # fmt: skip
    assert request.status.status_code == StatusCode.UNSET


def test_the_client_decides_where_it_names_a_trace() -> None:
    assert len(told(asked(SAMPLED), sampling_ratio=0.0)) == 1
    assert not told(asked(UNSAMPLED), sampling_ratio=1.0)
    assert not told(asked(), sampling_ratio=0.0)
    (alone,) = told(asked("not a trace"))
    assert alone.parent is None


def test_faults_are_told_and_health_is_not() -> None:
    (fault,) = told(asked(status=500))
    assert fault.status.status_code == StatusCode.ERROR
    (refused,) = told(asked(status=422))
    assert refused.status.status_code == StatusCode.UNSET
    assert not told(asked(route="/readyz"))


def test_no_exporter_no_traces() -> None:
    assert traces_of(Settings()) is None
    with pytest.raises(ConfigError, match="nowhere:nothing"):
        traces_of(Settings(tracing=Tracing(exporter="nowhere:nothing")))
    with pytest.raises(ConfigError, match="cannot be imported"):
        Traces(Tracing(exporter="json"))


@pytest.fixture
def with_telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    """A service in a process in which somebody has set OpenTelemetry up for everything that knows it."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(MEMORY))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    with in_process() as server:
        yield server


def test_fastapi_tells_nothing_by_itself(with_telemetry: InProcess) -> None:
    MEMORY.clear()
    with_telemetry.post("/v1/classify?q=secret", {"inputs": "secret"})
    assert not MEMORY.get_finished_spans()
