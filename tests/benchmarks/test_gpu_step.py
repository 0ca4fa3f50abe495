"""The benchmark of a GPU's steps says in one line that there is none; what it measures runs on a CPU too."""

import json

import pytest
import torch

from benchmarks.gpu_step import decode, main, make_translator, rates, step_seconds
from seqmodels.stepper import Stepper


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^this benchmark needs a CUDA device, and torch finds none here$"):
        main([])


def test_what_it_measures() -> None:
    stepper = Stepper(make_translator(layers=2, hidden=16, vocabulary=50))
    assert step_seconds(stepper, rows=8, repeats=1) > 0
    result = rates(decode(stepper, batch=3, tokens=4, repeats=1))
    assert (result["sentences"], result["output_tokens"]) == (6, 24) and result["tokens_per_second"] > 0


@pytest.mark.gpu
def test_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--layers", "2", "--hidden", "64", "--vocabulary", "200", "--batch", "8", "--tokens", "5", "--repeats", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["benchmark"] for line in lines] == ["gpu_step"] * 48 + ["gpu_decode"] * 4
    assert torch.cuda.is_available()
