"""The benchmark of recurrences at its smallest: a line for each kind and each measure."""

import json

import pytest
import torch

from benchmarks.cells import BASE, KINDS, MEASURES, main


def test_a_line_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--repeats", "1", "--hidden-size", "8"])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["recurrence"] for line in lines] == list(KINDS) * len(MEASURES)
    assert all(line["median_ms"] > 0 for line in lines)
    assert all(line["median_ratio_to_lstm"] == 1 for line in lines if line["recurrence"] == BASE)
