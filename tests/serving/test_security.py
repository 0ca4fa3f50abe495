"""Each promise of SECURITY.md names a test that exists; those that have none elsewhere are here."""

import ast
import asyncio
import builtins
import hmac
import re
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from serving import auth

from .conftest import api_key, error_of, in_process

ROOT = Path(__file__).parents[2]
PROMISES = re.findall(r"^\| (.+?) \| `(tests/\S+?)::(\w+)` \|$", (ROOT / "SECURITY.md").read_text(), re.M)


def test_every_promise_has_a_test() -> None:
    lines = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    assert len(PROMISES) == len([line for line in lines if not line.startswith("| promise")]) >= 20
    for promise, path, name in PROMISES:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, promise


def test_a_key_is_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that an answer takes must not tell how much of a key was right, nor which one it was."""
    compared: list[str] = []
    compare = hmac.compare_digest

    def spying(one: str, other: str) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spying)
    keys = [api_key(f"key number {i} of several") for i in range(5)]
    for given in ("key number 0 of several", "key number 4 of several", "none of them"):
        compared.clear()
        auth.find_key(given, keys)
        assert compared == [key.sha256 for key in keys]


def test_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, in_process() as server:
        listening.settimeout(0.3)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        for image in (address, f"file://{__file__}", f"data:image/png;base64,{address}"):
            error = error_of(server.post("/v1/caption", {"inputs": {"image": image}}), 400)
            assert error["code"] == "invalid_base64"
        assert server.post("/v1/translate", {"inputs": address}).status_code == 200  # to a translator it is a text
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "mood/../names", "..", "", "mood\x00", "models/mood"]
)
def test_no_name_of_a_model_reaches_the_file_system(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    really_open = builtins.open

    def spying(file: Any, *args: Any, **options: Any) -> Any:
        opened.append(file)
        return really_open(file, *args, **options)

    with in_process() as server:
        monkeypatch.setattr(builtins, "open", spying)
        for path in ("/v1/classify", "/v1/tag"):
            assert error_of(server.post(path, {"model": name, "inputs": "x"}), 404)["code"] == "model_not_found"
        monkeypatch.undo()
    assert not [file for file in opened if "passwd" in str(file) or "mood" in str(file)]


def test_a_full_queue_refuses_within_ten_milliseconds() -> None:
    with in_process(max_requests=4, limits={"inputs": 4}) as server:
        pipeline = server.pipelines["en-de"]
        pipeline.gate.clear()

        async def refusals() -> list[float]:
            body = {"inputs": "a"}
            waiting = [asyncio.ensure_future(server.send("POST", "/v1/translate", json=body)) for _ in range(4)]
            while server.runner.num_open < 4:
                await asyncio.sleep(0.01)
            taken = []
            for _ in range(20):
                started_at = time.perf_counter()
                response = await server.send("POST", "/v1/translate", json=body)
                taken.append(time.perf_counter() - started_at)
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            pipeline.gate.set()
            assert [(await one).status_code for one in waiting] == [200] * 4
            return taken

        assert statistics.median(server.wait(refusals())) < 0.01
