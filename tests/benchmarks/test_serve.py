"""Load, what is counted of it, and the stock recipe's search, which must find what the engine finds."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from benchmarks.load import Ask, Load, Outcome
from benchmarks.running import Running
from benchmarks.serve import Workload, point, rate_of
from benchmarks.stock.app import padded_beam_search
from benchmarks.workload import make_requests
from seqmodels.decoding.generate import generate
from seqmodels.decoding.params import SearchParams
from tests.seqmodels.builders import make_translator


class Echo(BaseHTTPRequestHandler):
    """Gives back what it gets; an error to what is not JSON."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(500 if body == b"bad" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def asks() -> list[Ask]:
    return [
        Ask("/", b"right", lambda body: body == b"right"),
        Ask("/", b"wrong", lambda body: body == b"right"),
        Ask("/", b"bad", lambda body: True),
    ]


def test_an_open_loop_sends_what_was_due_and_tells_right_from_wrong(address: str) -> None:
    outcomes = Load(address).open_loop(asks(), rate=60, seconds=1)
    assert 30 < len(outcomes) < 100 and all(0 <= one.due_s < 1 for one in outcomes)
    for number, one in enumerate(outcomes):
        assert (one.is_right, one.status) == [(True, 200), (False, 200), (False, 500)][number % 3]
    assert outcomes == sorted(outcomes, key=lambda one: one.due_s)
    again = Load(address).open_loop(asks(), rate=60, seconds=1)
    assert [one.due_s for one in again] == [one.due_s for one in outcomes]


def test_a_closed_loop_waits_for_its_answers(address: str) -> None:
    outcomes = Load(address).closed_loop(asks()[:1], clients=2, seconds=0.3)
    assert len(outcomes) > 4 and all(one.is_right for one in outcomes)
    busy = sum(one.seconds for one in outcomes)
    assert busy <= 2 * max(one.due_s + one.seconds for one in outcomes) + 0.1


def test_nobody_answers() -> None:
    (outcome, *_) = Load("http://127.0.0.1:9").open_loop(asks()[:1], rate=100, seconds=0.1)
    assert outcome.status == 0 and not outcome.is_right and "127.0.0.1" in outcome.told


def test_what_a_process_takes_of_a_core() -> None:
    """Python's own count of it is the oracle; what only sleeps takes nothing."""
    busy = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        service = Running(0, process, Path())
        assert process.stdout and process.stdin
        process.stdout.readline()
        taken = service.processor_seconds("process_time")
        assert 0.45 <= taken < 0.7
        time.sleep(0.3)
        assert service.processor_seconds("process_time") - taken < 0.1
        assert service.processor_seconds("no such process") == 0
        process.stdin.close()


def test_what_is_counted() -> None:
    outcomes = [Outcome(0.0, 0.01, 0.1, 200, True, 2), Outcome(1.0, 0.3, 0.9, 200, True, 2)]
    outcomes.append(Outcome(2.0, 0.0, 0.0, 429, False, 2))
    assert rate_of(outcomes) == 4 / 2.0
    whole = Workload("translate", "/", {}, [], [], within_s=0.5)
    found = point(outcomes, 1.0, 2.0, whole)
    assert (found.goodput, found.p50_ms, found.p99_ms) == (0.5, 900.0, float("inf"))
    streamed = Workload("generate", "/", {"stream": True}, [], [], within_s=0.5)
    assert point(outcomes, 1.0, 2.0, streamed).goodput == 1.0


def test_answers_are_compared_with_those_of_their_sentences() -> None:
    work = Workload("m", "/", {}, ["a", "b", "c", "d"], [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}], 1.0)
    one, two = work.asks()[1], work.asks(2)[1]
    assert json.loads(one.body)["inputs"] == "b" and json.loads(two.body)["inputs"] == ["c", "d"]
    assert one.is_right(b'{"results": [{"n": 2}]}') and not one.is_right(b'{"results": [{"n": 1}]}')
    assert two.is_right(b'{"results": [{"n": 3}, {"n": 4}]}') and two.inputs == 2
    streamed = Workload("m", "/", {"stream": True}, ["a"], [{"n": 1}], 1.0).asks()[0]
    assert streamed.is_right(b'event: delta\ndata: {"delta": "x"}\n\nevent: answer\ndata: {"results": [{"n": 1}]}\n\n')


def test_the_padded_search_finds_what_the_engine_finds() -> None:
    torch.manual_seed(0)
    model = make_translator().eval()
    sources = [torch.randint(4, 12, (length,)) for length in (3, 7, 1, 5)]
    params = SearchParams(num_beams=3, max_new_tokens=12, early_stopping=False, length_penalty=0.0)
    ours = generate(model, make_requests(sources, params))
    ended = [[token for token in one[0].tokens if token > 3] for one in ours]
    assert padded_beam_search(model, sources, 3, 12) == ended
