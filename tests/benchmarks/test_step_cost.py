"""The step-cost benchmark at its smallest: the points that were asked for, and their plot."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.step_cost import main


def test_a_line_for_each_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        points = ["--waiting", "0", "3", "--lengths", "6", "2", "--rooms", "9"]
        main(["--steps", "2", *points, "--plot", str(tmp_path / "cost.png")])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [("waiting", 0), ("waiting", 3), ("length", 2), ("length", 6), ("max_new_tokens", 9)]
    assert [(name, line[name]) for (name, _), line in zip(expected, lines, strict=True)] == expected
    assert all(line["step_ms"] > 0 for line in lines)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
