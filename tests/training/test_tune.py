"""Ray Tune: trials are runs of `train`, those that fall behind are stopped, the best is kept."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml

from seqmodels.pretrained import load_pretrained
from tests.training.conftest import TrainUntil
from tests.training.recipes import WORDS, fields, write_rows
from training.__main__ import main
from training.data.generated import generate
from training.directory import RunFile
from training.parsing import load_recipe
from training.report import provenance
from training.run import train
from training.space import draw_trials, load_space

VALIDATIONS, SEED = 4, 23
SPACE = {"optim.learning_rate": {"log_uniform": [1e-6, 1e-1]}, "data.path": {"choice": ["rows.csv"] * 5 + ["gone.csv"]}}


def stopped_by_hand(curves: dict[int, list[float]]) -> dict[int, int]:
    """ASHA for trials that run one after another: after how many validations each is stopped, if it is."""
    stopped = {}
    rungs: dict[int, list[float]] = {1: [], 3: []}
    for number, nll in sorted(curves.items()):
        for rung, seen in rungs.items():
            best = max([-value for value in nll[:rung]], default=0.0)
            if len(nll) >= rung:
                if seen and best < np.percentile(seen, 100 * 2 / 3):
                    stopped[number] = rung
                seen.append(best)
    return stopped


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_search_end_to_end(
    tmp_path: Path,
    small_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train_until: TrainUntil,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.csv", generate("sentiment")["train"][:150])
    data = {"path": "rows.csv", "columns": {"input": "input", "target": "target"}, "cut": {"validation": 50}}
    run = {"max_steps": 5 * VALIDATIONS, "eval_steps": 5, "save_steps": 5, "metric_for_best_model": "nll"}
    made = fields(data={**data, "tokenizer": WORDS}, run=run)
    Path("mine.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    Path("space.yaml").write_text(yaml.safe_dump(SPACE), encoding="utf-8")
    command = ["tune", "mine.yaml", "space.yaml", "run.output_dir=search", "--at-once", "1", "--seed", str(SEED)]
    interrupt_trial_0(train_until)

    assert main([*command, "--trials", "5"]) == 0
    out = capsys.readouterr().out
    lines = lines_of(Path("search/trials.csv"))
    curves = {n: [line["validation"]["nll"] for line in log_of(n)] for n in range(5)}
    stopped = stopped_by_hand({n: nll for n, nll in curves.items() if nll})
    ended = {int(line["trial"]): line["ended"] for line in lines}
    assert set(ended.values()) == {"finished", "stopped", "failed"}
    for number, nll in curves.items():
        if ended[number] == "failed":
            assert not nll and "gone.csv" in lines[-1]["problem"]
        else:
            assert len(nll) == stopped.get(number, VALIDATIONS)
            assert ended[number] == ("stopped" if number in stopped else "finished")
    best = min((n for n in curves if ended[n] == "finished"), key=lambda n: min(curves[n]))
    assert lines[0]["trial"] == str(best) and float(lines[0]["nll"]) == min(curves[best])
    assert f"the best, trial {best}, is in search/trial-{best:03d}" in out and "(to go on)" in out
    page = Path("search/report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "optim.learning_rate" in page and "http://" not in page.split("<svg")[0]
    assert "learning_rate: 0.001" in page and "log_uniform:" in page  # the recipe, and the space
    own = (trial(best) / "report.html").read_text(encoding="utf-8")
    facts = re.findall("<tr><th>(?:Rows|Made with|Processor|Again)</th>.*?</tr>", own)
    assert len(facts) == 4 and all(fact in page for fact in facts) and f"torch {torch.__version__}" in page
    assert not list(Path("search").glob(".ray"))

    for number in set(curves) - {best}:
        kept = {path.name for path in trial(number).iterdir()}
        assert not kept & {"checkpoints", "validated", "model.safetensors"} and "metrics.jsonl" in kept

    # A trial is what `train` makes of the same values, to the bit, interrupted or not.
    for number in (0, best):
        line = next(line for line in lines if line["trial"] == str(number))
        train(
            load_recipe(Path("mine.yaml"), [*(f"{key}={line[key]}" for key in SPACE), f"run.output_dir=alone-{number}"])
        )
        logs = [Path(f"{directory}/metrics.jsonl").read_bytes() for directory in (f"alone-{number}", trial(number))]
        assert logs[0] == logs[1]
    assert load_pretrained(trial(best)).revision == load_pretrained(Path(f"alone-{best}")).revision
    assert "going on from step 10" in (trial(0) / "train.log").read_text(encoding="utf-8")

    # The same command has nothing to do but for the trial that failed, and more trials join those that are there.
    write_rows(Path("gone.csv"), generate("sentiment")["train"][:150])
    before = {number: (trial(number) / "train.log").read_bytes() for number in curves if ended[number] != "failed"}
    assert main([*command, "--trials", "6"]) == 0
    after = {int(line["trial"]): line["ended"] for line in lines_of(Path("search/trials.csv"))}
    assert after.keys() == {*range(6)} and "failed" not in after.values()
    assert before == {number: (trial(number) / "train.log").read_bytes() for number in before}
    assert len(list(Path("search").glob("trial-*/model.safetensors"))) == 1

    monkeypatch.setitem(sys.modules, "training.tune", None)  # an import would fail
    capsys.readouterr()
    assert main([*command, "--trials", "2"]) == 0
    assert "all 6 trials in search are done; nothing to do" in capsys.readouterr().out


def interrupt_trial_0(train_until: TrainUntil) -> None:
    """Leave it as a search leaves it that was interrupted in step 12."""
    (first,) = draw_trials(Path("mine.yaml"), ["run.output_dir=search"], load_space(Path("space.yaml")), 1, SEED)
    train_until(first.recipe, 12)


def trial(number: int) -> Path:
    return Path(f"search/trial-{number:03d}")


def log_of(number: int) -> list[dict[str, Any]]:
    path = trial(number) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "validation" in line]


def test_a_search_whose_trials_all_fail_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(fields()), encoding="utf-8")
    Path("space.yaml").write_text(yaml.safe_dump({"optim.learning_rate": {"choice": [1e-3]}}), encoding="utf-8")
    monkeypatch.setattr("training.tune.run_trials", lambda trials, *_: {one.number: "no data" for one in trials})
    assert main(["tune", "mine.yaml", "space.yaml", "--trials", "2"]) == 2
    told = capsys.readouterr()
    assert told.err == "error: all trials failed, the first with: no data\n" and "failed" in told.out


def test_a_report_elsewhere_leaves_out_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search on GPUs may be concluded on a machine without one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = SimpleNamespace(data="abc", torch="2", threads=1)
    assert "Processor" not in provenance(Path("trial"), cast(RunFile, run), "cuda")
    assert "Processor" in provenance(Path("trial"), cast(RunFile, run), "cpu")
