"""A client that closes its connection: its rows are free at the next step, whether it streamed or not."""

import asyncio
import json
import time
from typing import Any

import pytest

from .conftest import InProcess, in_process
from .fakes import FakePipeline


async def ask_and_leave(
    server: InProcess, body: dict[str, Any], after_chunks: int, by_error: bool = False
) -> list[bytes]:
    """Speak ASGI by hand: send a request, take so many chunks (or none, and wait a little), close the connection.

    after_chunks=-1 closes it while the head of the response is on its way. by_error: it is told by an error, as Ray's
    proxy may do, and not by a message.
    """
    taken: list[bytes] = []
    leave = asyncio.Event()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await leave.wait()
        if by_error:
            raise RuntimeError("the call was cancelled")
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if after_chunks < 0:
            leave.set()
            await asyncio.sleep(10)
        if message["type"] == "http.response.body" and message["body"]:
            taken.append(message["body"])
            if len(taken) >= after_chunks:
                leave.set()

    if after_chunks == 0:
        asyncio.get_running_loop().call_later(0.15, leave.set)
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/translate", "raw_path": b"/v1/translate", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": ("test", 1), "server": ("test", 80),
    }  # fmt: skip
    await asyncio.wait_for(server.app(scope, receive, send), 10)  # type: ignore[arg-type]
    return taken


@pytest.mark.parametrize("by_error", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_rows_are_free_at_the_next_step(stream: bool, by_error: bool) -> None:
    pipeline = FakePipeline("translate", step_s=0.02)
    with in_process({"slow": pipeline}) as server:
        body = {"inputs": ["a " * 30, "b " * 30], "stream": stream}
        started_at = time.monotonic()
        taken = server.wait(ask_and_leave(server, body, 2 if stream else 0, by_error))
        assert len(taken) == (2 if stream else 0)
        while server.runner.num_open:
            assert time.monotonic() < started_at + 0.5, "rows are still held"
            time.sleep(0.005)
        assert not pipeline.live and pipeline.steps < 25


def test_who_leaves_before_the_first_byte_of_a_stream_holds_nothing() -> None:
    pipeline = FakePipeline("translate", step_s=0.02)
    with in_process({"slow": pipeline}) as server:
        assert server.wait(ask_and_leave(server, {"inputs": "a " * 30, "stream": True}, after_chunks=-1)) == []
        time.sleep(0.2)
        assert not pipeline.live and pipeline.steps < 20


def test_many_leave_and_nothing_leaks() -> None:
    pipeline = FakePipeline("translate", step_s=0.002)
    with in_process({"slow": pipeline}) as server:

        async def crowd() -> None:
            bodies: list[dict[str, Any]] = [{"inputs": "a " * 30, "stream": bool(i % 2)} for i in range(100)]
            await asyncio.gather(
                *(ask_and_leave(server, body, body["stream"] * (i % 5)) for i, body in enumerate(bodies))
            )

        server.wait(crowd())
        response = server.post("/v1/translate", {"inputs": "still here"})
        assert response.status_code == 200
        assert server.runner.num_open == 0 and not pipeline.live
