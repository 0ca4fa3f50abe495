"""The benchmark of prompts runs, and counts what was read."""

import json

import pytest
import torch

from benchmarks.prefixes import main


def test_what_is_shared_is_read_once(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--tokens", "40"])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompts"] for line in lines[:3]] == [1, 1, 16]
    assert [line["tokens_read"] for line in lines[3:]] == [[40, 40, 40], [40, 8, 8]]
