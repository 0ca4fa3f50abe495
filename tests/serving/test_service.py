"""The real thing once: `python -m serving` in a process of its own, over Ray Serve, asked by our client.

What is served must be what the pipeline answers offline, to the last bit.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.running import ROOT, START_S, Running, running, started, until
from seqmodels.pipeline import Pipeline
from serving.auth import hash_key
from serving.client import Client, ServiceError

from .fakes import gif, png

KEY = "a key that only this test knows"
ENVIRONMENT = {"SEQMODELS_API_KEYS": KEY, "RAY_ADDRESS": "127.0.0.1:1"}  # it begins a Ray of its own all the same
BATCH = (
    "POST /v1/batch HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n"
    f"authorization: Bearer {KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
).encode()
both_profiles = pytest.mark.parametrize("service", ["plain", "haproxy"], indirect=True)


def end(service: Running, number: signal.Signals) -> None:
    """Also with nothing to complain of."""
    service.end(number)
    at_fault = [line for line in service.log.splitlines() if "Traceback" in line or "ERROR" in line]
    assert not at_fault, service.log


@pytest.fixture(scope="module", params=["plain"])
def service(request: pytest.FixtureRequest, models: dict[str, str]) -> Iterator[Running]:
    """One service for all tests of a profile, which is "plain" where a test does not name it."""
    fields: dict[str, Any] = {
        "limits": {"max_new_tokens": 4000, "batch_bytes": 2_000_000}, "drain_s": 5.0, "profile": request.param,
        "tracing": {"exporter": "opentelemetry.sdk.trace.export:ConsoleSpanExporter", "sampling_ratio": 0.0},
    }  # fmt: skip
    with running(models, ENVIRONMENT, **fields) as service:
        assert f"serving {', '.join(models)} at {service.address}" in service.log
        yield service
        end(service, signal.SIGINT)
    with pytest.raises(OSError), connected(service.address):
        pass


@pytest.fixture
def address(service: Running) -> str:
    return service.address


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.address, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def offline(models: dict[str, str]) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(directory) for name, directory in models.items()}


def plain(answer: Any) -> Any:
    return answer.model_dump(exclude_none=True)["results"]


@both_profiles
def test_every_endpoint_answers_as_the_pipeline_does_offline(client: Client, offline: dict[str, Pipeline]) -> None:
    texts = ["a good day", "x" * 30, "Grüße"]
    for name in ("mood", "topics", "rating"):  # one label, several, numbers
        assert plain(client.classify(texts, model=name)) == offline[name](texts)
    assert plain(client.tag(texts, model="names")) == offline["names"](texts)
    beams = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, "logprobs": True}
    assert plain(client.translate(texts, **beams)) == offline["en-de"](texts, **beams)
    beams |= {"top_logprobs": 3, "output_attentions": True, "coverage_penalty": 0.2}
    assert plain(client.translate(texts, **beams)) == offline["en-de"](texts, **beams)
    samples: dict[str, Any] = {"do_sample": True, "seed": 5, "num_return_sequences": 3, "max_new_tokens": 12}
    assert plain(client.generate("on", **samples)) == offline["story"](["on"], **samples)
    picture = png()
    caption = {"max_new_tokens": 6, "output_attentions": True}
    assert plain(client.caption(picture, **caption)) == offline["describe"]([{"image": picture}], **caption)
    clip = {"frames": [png(8, 8), png(9, 9)]}
    assert plain(client.tag([clip], model="motion")) == offline["motion"]([clip])
    moving = {"frames": gif(3)}
    assert plain(client.tag(moving, model="motion")) == offline["motion"]([moving])
    series = {"features": [[0.5, 1.0, -2.0]] * 4}
    assert plain(client.classify(series, model="series")) == offline["series"]([series])
    assert plain(client.score(["b"], ["a"], model="en-de")) == offline["en-de"].score(["a"], ["b"])


def test_models_and_readiness(client: Client, address: str, offline: dict[str, Pipeline]) -> None:
    assert {card.id: card.revision for card in client.models()} == {n: p.revision for n, p in offline.items()}
    assert client.is_ready()
    assert httpx.get(f"{address}/healthz").status_code == 200
    for path in ("/v1/models", "/docs"):
        assert httpx.get(address + path).status_code == 401


def test_errors_reach_the_client(client: Client) -> None:
    with pytest.raises(ServiceError, match="num_beams is 64, but this server allows at most 16") as caught:
        client.translate("x", num_beams=64)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "limit_exceeded", "num_beams")
    with pytest.raises(ServiceError) as caught:
        client.translate(["a", ""])
    assert (caught.value.status, caught.value.param) == (422, "inputs[1]")


def test_completion_in_openai_shape(address: str) -> None:
    body = {"model": "story", "prompt": "on", "max_tokens": 5, "seed": 3, "stream": True}
    with httpx.stream(
        "POST", f"{address}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
    ) as got:
        lines = [line for line in got.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]


@both_profiles
def test_a_stream_says_what_the_answer_says(client: Client) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "num_return_sequences": 2, "do_sample": True, "seed": 9}
    pieces = ["", ""]
    for _, sequence, text in client.stream("generate", "once", **options):
        pieces[sequence] += text
    assert pieces == [sequence.text for sequence in client.generate("once", **options).results[0].sequences]


@both_profiles
def test_a_client_that_leaves_frees_its_rows(client: Client, address: str) -> None:
    for _ in range(10):
        stream = client.stream("generate", "on", max_new_tokens=4000, min_new_tokens=4000)
        next(stream)
        stream.close()
    body = {"inputs": "on", "max_new_tokens": 4000, "min_new_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/generate", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=0.3)
    limit = time.monotonic() + 3
    while (report := httpx.get(f"{address}/readyz").json())["requests"] or report["models"]["story"]["rows_live"]:
        assert time.monotonic() < limit, report
        time.sleep(0.05)


@both_profiles
def test_a_batch_answers_while_lines_are_still_sent(address: str) -> None:
    with connected(address) as service:
        service.sendall(BATCH)
        for number in range(2):
            body = {"model": "mood", "inputs": "a good day"}
            line = json.dumps({"custom_id": f"number-{number}", "url": "/v1/classify", "body": body}) + "\n"
            service.sendall(f"{len(line):x}\r\n{line}\r\n".encode())
            received = b""
            while f"number-{number}".encode() not in received:
                received += service.recv(4096) or pytest.fail(received.decode())
        service.sendall(b"0\r\n\r\n")
        while not received.endswith(b"0\r\n\r\n"):
            received += service.recv(4096) or pytest.fail(received.decode())


@pytest.mark.parametrize("service", ["haproxy"], indirect=True)
def test_a_client_is_held_back_where_its_batch_is_at_work(client: Client, address: str) -> None:
    body = {"model": "story", "inputs": "on", "max_new_tokens": 4000, "min_new_tokens": 4000}
    line = json.dumps({"url": "/v1/generate", "body": body}).encode() + b" " * 200_000 + b"\n"
    sent, most = 0, 60_000_000  # what waits, and what the sockets on the way hold
    with connected(address) as service, pytest.raises(TimeoutError):
        service.settimeout(3)
        service.sendall(BATCH)
        while sent < most:
            service.sendall(b"%x\r\n%b\r\n" % (len(line), line))
            sent += len(line)
    assert client.classify("a good day", model="mood").results


@pytest.mark.parametrize("service", ["haproxy"], indirect=True)
@pytest.mark.parametrize(
    ("name", "status"),
    [
        (b"x-request-id", 200), (b"x-request-timeout-seconds", 400), (b"x-request-disconnect-disabled", 200),
        (b"x-session-id", 200), (b"serve_multiplexed_model_id", 200), (b"serve-multiplexed-model-id", 200),
    ],
)  # fmt: skip
def test_a_header_that_is_no_text_is_no_fault_of_ours(address: str, name: bytes, status: int) -> None:
    body = {"model": "mood", "inputs": "a good day"}
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (name, b"\xff")]
    response = httpx.post(f"{address}/v1/classify", json=body, headers=headers)
    assert response.status_code == status and response.headers["content-type"] == "application/json", response.text


def connected(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20)


@pytest.mark.parametrize("service", ["haproxy"], indirect=True)
def test_silent_clients_are_left_and_others_served(client: Client, address: str) -> None:
    """Those that send nothing, half a head, half a body, or a byte now and then."""
    head = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n"
    head += f"authorization: Bearer {KEY}\r\n".encode()
    began = time.monotonic()
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(address)) for _ in range(6)]
        for one, sent in zip(silent, [b"", b"", head[:20], head, head + b"\r\n{"], strict=False):
            one.sendall(sent)
        while time.monotonic() < began + 9:
            silent[-1].sendall(b"x")
            assert client.classify("a good day", model="mood").results
            time.sleep(0.5)
        for one in silent:
            one.settimeout(max(began + 13 - time.monotonic(), 0.1))
            assert one.recv(4096).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize("service", ["haproxy"], indirect=True)
def test_haproxy_listens_where_it_was_told_and_keeps_its_files_to_itself(client: Client, service: Running) -> None:
    (own,) = service.home.glob("h*/*/haproxy.cfg")
    config = own.read_text()
    assert re.findall(r"^ *bind (.*)", config, re.M) == [service.address.removeprefix("http://")]
    assert re.findall(r"stats socket (\S+) mode 600", config) == [str(own.with_name("admin"))]
    assert own.parents[1].stat().st_mode & 0o777 == 0o700
    assert "local0 info" not in config  # which would tell what stands in a request's query
    assert re.search("timeout http-request 10s", config) and re.search("retry-on conn-failure$", config, re.M)


def test_deadline(address: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-request-timeout-seconds": "0.5"}
    body = {"max_new_tokens": 4000, "min_new_tokens": 4000}
    response = httpx.post(f"{address}/v1/generate", json=body, headers=headers)
    assert response.status_code == 408 and response.json()["error"]["code"] == "deadline_passed"


def test_each_request_is_logged_once_without_what_it_said(client: Client, service: Running) -> None:
    request_id = "the-one-in-the-log"
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": request_id}
    body = {"model": "mood", "inputs": "a text that nobody may log"}
    words = {**headers, "x-request-id": "words that nobody may log"}
    assert httpx.post(f"{service.address}/v1/classify", json=body, headers=words).status_code == 200
    response = httpx.post(f"{service.address}/v1/classify", json=body, headers=headers)
    assert response.status_code == 200 and response.headers.get_list("x-request-id") == [request_id]
    (log,) = service.home.glob("ray/session_2*/logs/serve/replica_*.log")
    limit = time.monotonic() + 10  # the line is written after the answer has gone out
    while not (lines := [line for line in whole_lines(log) if request_id in line]):
        assert time.monotonic() < limit
        time.sleep(0.02)
    (line,) = map(json.loads, lines)
    assert line["levelname"] == "INFO" and line["replica"]
    told = line["exchange"]
    assert (told["request_id"], told["client"], told["route"]) == (request_id, hash_key(KEY)[:8], "/v1/classify")
    assert (told["status"], told["input_tokens"]) == (200, 26) and line["request_id"] == request_id
    assert "nobody may log" not in log.read_text() and KEY not in log.read_text()


def test_a_request_is_traced_where_its_client_is_without_what_it_said(
    client: Client, service: Running, offline: dict[str, Pipeline]
) -> None:
    """By an exporter that prints: what a replica prints, Ray keeps in a file."""
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-{caller}-01"}
    headers["x-request-id"] = "words that nobody may tell"
    body = {"model": "mood", "inputs": ["a text that nobody may log", "another"]}
    client.classify("an untraced one", model="mood")
    response = httpx.post(f"{service.address}/v1/classify?q=nobody+may+log", json=body, headers=headers)
    assert response.status_code == 200
    limit = time.monotonic() + 60  # spans go out every few seconds
    while len(spans := printed_spans(service)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.1)
    (request,) = (span for span in spans if span["name"] == "/v1/classify")
    first, second = (span for span in spans if span["name"] == "input")
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{trace}"}
    assert request["parent_id"] == f"0x{caller}" and request["kind"] == "SpanKind.SERVER"
    assert first["parent_id"] == second["parent_id"] == request["context"]["span_id"]
    told = request["attributes"]
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/classify", 200)
    assert (told["seqmodels.model"], told["seqmodels.revision"]) == ("mood", offline["mood"].revision)
    assert len(told["seqmodels.request_id"]) == 32
    assert told["seqmodels.input_tokens"] == response.json()["usage"]["input_tokens"]
    assert 0 <= first["attributes"]["seqmodels.queue_s"] <= first["attributes"]["seqmodels.first_token_s"]
    assert "nobody" not in json.dumps(spans) and KEY not in json.dumps(spans)


def printed_spans(service: Running) -> list[dict[str, Any]]:
    printed = "".join(path.read_text() for path in service.home.glob("ray/session_2*/logs/worker-*.out"))
    return [json.loads(one) for one in re.findall(r"^\{$.*?^\}$", printed, re.M | re.S)]


def whole_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def swap(service: Running, *arguments: str) -> str:
    command = [sys.executable, "-m", "serving", "swap", *arguments, "--address", service.cluster]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@both_profiles
def test_a_model_changes_under_load_without_a_lost_answer(
    client: Client, service: Running, models: dict[str, str], offline: dict[str, Pipeline]
) -> None:
    """Every answer is that of the model it names, before, after and in between."""
    labels = {offline[name].revision: offline[name](["a good day"])[0] for name in ("mood", "topics")}
    seen: list[str] = []
    over = threading.Event()

    def go_on() -> None:
        with Client(service.address, api_key=KEY) as own:
            while not over.is_set():
                answer = own.classify("a good day", model="mood")
                assert answer.model == "mood" and plain(answer) == [labels[answer.revision]]
                seen.append(answer.revision)

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(go_on) for _ in range(2)]
        until(lambda: bool(seen), 30)
        told = swap(service, f"mood={models['topics']}", "--alias", "feelings=mood")
        assert f"1 replica serves mood at {offline['topics'].revision}" in told
        assert client.classify("x", model="feelings").revision == offline["topics"].revision
        until(lambda: offline["topics"].revision in seen, 30)
        swap(service, f"mood={models['mood']}")
        assert client.classify("x", model="mood").revision == offline["mood"].revision
        over.set()
        for one in asking:
            one.result()
    assert seen[0] == offline["mood"].revision


@pytest.mark.parametrize("moment", ["as soon as it is ready", "while the models load"])
def test_an_early_sigterm_ends_it_in_peace(moment: str, models: dict[str, str]) -> None:
    path = "/healthz" if moment.startswith("while") else "/readyz"
    with started("serving", f"mood={models['mood']}", environment=ENVIRONMENT) as service:
        until(lambda: answers(service, path), START_S)
        end(service, signal.SIGTERM)


def answers(service: Running, path: str) -> bool:
    """Whether anything at all comes back, and from /readyz a yes."""
    assert service.process.poll() is None, service.log
    try:
        response = httpx.get(service.address + path)
    except httpx.HTTPError:
        return False
    return path != "/readyz" or response.status_code == 200
