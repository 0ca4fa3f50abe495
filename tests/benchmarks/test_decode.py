"""The benchmark of offline decoding runs, and counts what the engine did."""

import json

import pytest
import torch

from benchmarks.decode import main
from benchmarks.workload import make_requests, of_length, run
from seqmodels.decoding.engine import Engine
from seqmodels.decoding.params import SearchParams
from tests.seqmodels.builders import make_translator


def test_rows_and_tokens_are_counted() -> None:
    """Four answers of 6 tokens, two at a time, 3 beams each: 12 steps of 6 rows."""
    requests = make_requests([torch.tensor([5, 6, 3])] * 4, SearchParams(num_beams=3))
    result = run(Engine(make_translator(), max_rows=6), [of_length(request, 6) for request in requests])
    assert result.rows == [6] * 12
    assert result.tokens == 24


def test_one_line_per_result(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"limit": "2", "tokens": "2", "repeats": "1", "batches": "2", "threads": "1"}
    threads = torch.get_num_threads()
    try:
        main([*[f"--{name}={value}" for name, value in given.items()], "--beams", "1", "2"])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["num_beams"], line["order"]) for line in lines] == [
        (beams, order) for beams in (1, 2) for order in ("unsorted", "sorted")
    ]
    assert all(line["output_tokens"] == 4 and line["steps_per_token"] == 1 for line in lines)
