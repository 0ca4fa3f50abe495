"""The benchmark of features runs, and its figures add up."""

import json

import pytest
import torch

from benchmarks.features import main


def test_it_tells_rates_and_where_a_captions_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--pictures", "2", "--rounds", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    features, caption = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert features["share"] == pytest.approx(features["ours"] / features["bare"], abs=0.1)
    assert all(milliseconds > 0 for milliseconds in caption["caption_ms"].values())
