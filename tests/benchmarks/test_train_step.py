"""The benchmark of a training step: batches that every system reads alike, turns, and a check that all do the same."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers.exchange import BOS, EOS, PAD, Exported
from benchmarks.peers.training import main, make_batches
from benchmarks.train_step import main as benchmark
from benchmarks.train_step import take_turns
from tests.seqmodels.builders import make_translator


def test_rows_begin_and_end_and_are_padded() -> None:
    for batch in make_batches(3, 100):
        for row, length in zip(batch["labels"].tolist(), batch["label_lengths"].tolist(), strict=True):
            assert row[0] == BOS and row[length - 1] == EOS and set(row[length:]) <= {PAD}
            assert min(row[1 : length - 1]) > EOS
        for row, length in zip(batch["inputs"].tolist(), batch["lengths"].tolist(), strict=True):
            assert min(row[:length]) > EOS and set(row[length:]) <= {PAD}


def test_a_peer_answers_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the batch of that number, whatever the toolkit prints meanwhile."""
    Exported("", make_translator().state_dict(), []).save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["peer", "--exported", str(tmp_path), "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n2\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards

    def load(exported: Exported):  # type: ignore[no-untyped-def]
        print("a banner")
        return lambda batch: float(batch["lengths"].sum())

    main(load)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = make_batches(3, 40)
    assert [loss for _, loss in answers] == [float(expected[number]["lengths"].sum()) for number in (0, 2)]


def test_a_system_that_computes_something_else_stops_the_run() -> None:
    with pytest.raises(AssertionError, match="joeynmt computes another function"):
        take_turns({"ours": lambda number: (1.0, 9.0), "joeynmt": lambda number: (1.0, 9.1)}, 1)
    assert take_turns({"ours": lambda number: (number, 9.0), "bare": lambda number: (1.0, 8.0)}, 2) == {
        "ours": [0, 1],
        "bare": [1.0, 1.0],
    }


def test_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark(["--threads=1", "--steps=1"])
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["ours_target_tokens_per_second"] > 0 < result["ours_median_ratio_to_bare"]
