"""Several workers, without Ray: the same run as one worker's, up to the order of sums."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seqmodels.errors import CheckpointError, ConfigError, DataError
from seqmodels.pretrained import load_pretrained
from tests.training import together
from tests.training.kill_storm import outcome
from tests.training.recipes import DECODER, LANGUAGE_MODEL, TRANSLATOR, WORDS, fields, write_rows
from training import run
from training.checkpoint import saved_checkpoints
from training.data.generated import generate
from training.parsing import parse_recipe
from training.workers import ALONE, Workers

ROOT = Path(__file__).parent.parent.parent
FRAME_TAGGER = {
    "architecture": "tagger",
    "encoder": {"input": "frames", "backbone": {"channels": [4]}, "recurrent": {"hidden_size": 4}},
}
TASKS: dict[str, dict[str, Any]] = {
    # Batches of at most three rows, and of one or two where their lengths come to an end.
    "translate": {
        "data": {"path": "numbers-en-fr.csv", "columns": {"input": "input", "target": "target"}},
        "model": {**TRANSLATOR, "label_smoothing": 0.1},
        "optim": {"learning_rate": 0.01, "max_grad_norm": 0.3},
        "run": {"rows_per_batch": 3, "tokens_per_batch": 40, "gradient_accumulation_steps": 2},
        "generation": {"max_new_tokens": 5},
    },
    # Nine rows in two shares, whose states go on from chunk to chunk; the last is shorter than the others.
    "generate": {
        "data": {
            "path": "language-model.csv",
            "columns": {"target": "target"},
            "chunk_length": 7,
            "vary_chunk_length": True,
        },
        "model": {"architecture": "generator", "decoder": {**DECODER, "activation_penalty": 0.1}},
        "optim": {"learning_rate": 0.01, "gradient_noise": 0.01},
        "run": {"rows_per_batch": 9},
    },
}


def of_workers(task: str, directory: Path, workers: int) -> dict[str, Any]:
    settings = {"max_steps": 12, "logging_steps": 3, "eval_steps": 6, "workers": workers}
    data = {**TASKS[task]["data"], "tokenizer": WORDS, "cut": {"validation": 20}}
    data["path"] = str(directory.parent / data["path"])
    return fields(task, directory, **{**TASKS[task], "data": data, "run": {**TASKS[task]["run"], **settings}})


def lossy(folder: Path) -> dict[str, Any]:
    """The language model of two workers, with dropout, and with word vectors, which the first alone reads."""
    made = of_workers("generate", folder / "lossy-2", 2)
    data = {**made["data"], "target_vectors": str(folder / "vectors.txt")}
    return {**made, "data": data, "model": {**LANGUAGE_MODEL, "decoder": {**DECODER, "dropout": 0.3}}}


def numbers(value: Any) -> list[float]:
    """All numbers of nested plain data, in order."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [float(value)] if value is not None else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TASK-SIZE: a run of each task by one worker and by several."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("numbers-en-fr", "language-model"):
        write_rows(folder / f"{name}.csv", generate(name)["train"][:200])
    (folder / "vectors.txt").write_text("the" + DECODER["embedding_size"] * " 0.5" + "\n", encoding="utf-8")
    sizes = {"translate": (1, 2, 3), "generate": (1, 2)}
    runs = [of_workers(task, folder / f"{task}-{n}", n) for task, all_n in sizes.items() for n in all_n]
    together.start(*runs, lossy(folder))
    return folder


@pytest.mark.parametrize(("task", "size"), [("translate", 2), ("translate", 3), ("generate", 2)])
def test_workers_train_what_one_would(trained: Path, task: str, size: int) -> None:
    alone, together = trained / f"{task}-1", trained / f"{task}-{size}"
    weights, others = (load_pretrained(path).model.state_dict() for path in (alone, together))
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-5, rtol=1e-4), name
    logs = [(path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for path in (alone, together)]
    assert len(logs[0]) == 6  # four of steps, two of validations
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-3)


@pytest.mark.parametrize(("task", "size"), [("translate", 2), ("translate", 3), ("generate", 2), ("lossy", 2)])
def test_all_workers_end_with_the_same_weights(trained: Path, task: str, size: int) -> None:
    digests = {path.read_text(encoding="ascii") for path in (trained / f"{task}-{size}").glob("weights-*")}
    assert len(list((trained / f"{task}-{size}").glob("weights-*"))) == size and len(digests) == 1


def test_a_checkpoint_holds_what_each_worker_has_of_its_own(trained: Path) -> None:
    newest = {n: saved_checkpoints(trained / f"generate-{n}" / "checkpoints")[-1] for n in (1, 2)}
    alone, together = (load_file(newest[n] / "state.safetensors") for n in (1, 2))
    both = torch.cat([together["carried"], together["worker-1.carried"]])
    assert len(together["carried"]) == 4 and torch.allclose(both, alone["carried"], atol=1e-4)
    assert not torch.equal(together["random.cpu"], together["worker-1.random.cpu"])
    assert {name.removeprefix("worker-1.") for name in together} == alone.keys()


def test_going_on_gives_each_worker_its_own_back(trained: Path, tmp_path: Path) -> None:
    """From the checkpoint before the last, with dropout and carried state: to the bit."""
    alone, again = trained / "lossy-2", tmp_path / "lossy-2"
    shutil.copytree(alone, again)
    for name in ("finished.json", "model.safetensors", "config.json"):
        (again / name).unlink()
    newest, before = saved_checkpoints(again / "checkpoints")[::-1]
    assert (newest.name, before.name) == ("step-00000012-validated", "step-00000006-validated")
    shutil.rmtree(newest)
    together.start({**lossy(trained), "run": {**lossy(trained)["run"], "output_dir": str(again)}})
    assert outcome(again) == outcome(alone)


def test_every_row_is_one_workers() -> None:
    for rows in range(1, 9):
        batch = {"labels": torch.arange(rows), "inputs": torch.arange(2 * rows).view(rows, 2)}
        for size in (1, 2, 3, 5):
            shares = [share for rank in range(size) if (share := Workers(rank, size).share(batch)) is not None]
            for name, value in batch.items():
                assert torch.equal(torch.cat([share[name] for share in shares]), value)
            assert max(len(share["labels"]) for share in shares) == -(-rows // size)
            assert len(shares) == min(rows, size)


def test_workers_draw_numbers_of_their_own_and_the_first_those_of_one_alone() -> None:
    assert ALONE.seed(7) == Workers(0, 3).seed(7) == 7
    assert len({Workers(rank, 3).seed(seed) for rank in range(3) for seed in range(7)}) == 21


def test_other_data_on_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "of_first", lambda _, __: "of the first worker")
    with pytest.raises(DataError, match="worker 1 reads other data"):
        run._check_same(Workers(1, 2), {"train": [], "validation": []})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": {"workers": 5, "rows_per_batch": 4}}, ["run.workers is 5", "run.rows_per_batch is 4"]),
        ({"run": {"workers": 0}}, ["run.workers"]),
        (
            {
                "task": "generate",
                "data": {"generated": "language-model", "chunk_length": 20},
                "model": LANGUAGE_MODEL,
                "run": {"workers": 3, "tokens_per_batch": 50},
            },
            ["run.workers is 3", "run.tokens_per_batch of 50 holds 2 chunks"],
        ),
        (
            {"task": "tag", "data": {"generated": "frames"}, "model": FRAME_TAGGER, "run": {"workers": 2}},
            ["run.workers is 2", "model.encoder.backbone", "run.workers=1"],
        ),
    ],
)
def test_too_many_workers_and_statistics_of_batches_are_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(fields(**change))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_going_on_with_another_number_of_workers_is_refused(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"begun with run\.workers=2, but the recipe now says 1"):
        run.train(parse_recipe(of_workers("generate", trained / "generate-2", 1)))


def test_what_needs_no_ray_is_said_before_it_starts(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "training.distributed", None)  # an import would fail
    directory = trained / "generate-2"
    run.train(parse_recipe(of_workers("generate", directory, 2)))
    assert "is finished; nothing to do" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"run\.workers=2, but the recipe now says 3"):
        run.train(parse_recipe(of_workers("generate", directory, 3)))


def test_one_worker_needs_no_ray() -> None:
    code = "import sys, training.run, training.__main__; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
