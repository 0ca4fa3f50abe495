"""The benchmark of features runs, and its figures add up."""

import json

import pytest
import torch

from benchmarks.features import main


def test_it_tells_rates_and_where_a_captions_time_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three pictures: bare in 1, 4 and 2 seconds, ours in 4, 8 and 2."""
    taken = iter((1.0, 4.0, 4.0, 8.0, 2.0, 2.0))
    monkeypatch.setattr("benchmarks.features._seconds", lambda way: (way(), next(taken))[1])
    threads = torch.get_num_threads()
    try:
        main(["--pictures", "3", "--rounds", "3", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    features, caption = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (features["bare"], features["ours"], features["share"]) == (1.5, 0.8, 0.5)
    assert all(milliseconds > 0 for milliseconds in caption["caption_ms"].values())
