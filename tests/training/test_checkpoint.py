"""Checkpoints are whole or absent, and a damaged one falls back to the one before it."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from seqmodels.errors import CheckpointError
from tests.training.corruption import corrupt
from tests.training.kill_storm import ENTERED, outcome, recipe_fields
from training import checkpoint
from training.checkpoint import Progress
from training.config import OptimSection
from training.optim import build_optimizer
from training.parsing import parse_recipe
from training.run import train

ROOT = Path(__file__).parent.parent.parent


def save_three(directory: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(directory, Progress(step=step, loss=0.1 + step), {"x": torch.full((4,), float(step))})


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    save_three(tmp_path)
    assert [path.name for path in checkpoint.saved_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    progress, tensors, warnings = found
    assert progress == Progress(step=3, loss=3.1) and tensors["x"].tolist() == [3.0] * 4 and not warnings
    assert checkpoint.load_newest(tmp_path / "nothing") is None


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    save_three(tmp_path)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "step-00000003", check=True)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.PROGRESS, checkpoint.SUMS])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_newest_falls_back_to_the_last_good(tmp_path: Path, name: str, damage: str) -> None:
    save_three(tmp_path)
    path = tmp_path / "step-00000003" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
        path.write_bytes({"flip": flipped, "cut": data[: len(data) // 2], "empty": b""}[damage])
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0].step == 2
    assert "step-00000003" in found[2][0] and "damaged" in found[2][0]


def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    save_three(tmp_path)
    for path in tmp_path.glob("step-*/progress.json"):
        path.write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; remove"):
        checkpoint.load_newest(tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save_three(tmp_path)
    (tmp_path / ".writing" / "state.safetensors").mkdir(parents=True)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0].step == 3
    checkpoint.save(tmp_path, Progress(step=4), {"x": torch.zeros(1)})  # and is in nobody's way
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0].step == 4


def test_a_step_that_is_saved_again_is_never_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C in the first validation saves; the same step, validated, is saved when the run goes on. Killed before
    each call of that second save that changes the disk, there is always something to go on from."""
    cut = 0
    for call in range(40):
        directory, made = tmp_path / str(call), 0
        checkpoint.save(directory, Progress(step=3), {"x": torch.ones(1)})

        def counted(original: Any, call: int = call) -> Any:
            def before(*given: Any, **options: Any) -> Any:
                nonlocal made, cut
                made += 1
                if made == call:
                    cut += 1
                    raise KeyboardInterrupt
                return original(*given, **options)

            return before

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for module, name in ((checkpoint, "flush"), (checkpoint, "save_file"), (Path, "rename"), (Path, "mkdir")):
                patch.setattr(module, name, counted(getattr(module, name)))
            for name in ("remove", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            checkpoint.save(directory, Progress(step=3, validated_step=3), {"x": torch.ones(1)})
        found = checkpoint.load_newest(directory)
        assert found is not None and found[0].step == 3 and not found[2]
    assert cut >= 8
    assert found[0].validated_step == 3, "the last was not killed"


@pytest.mark.parametrize("damaged", [[4], [4, 5], [5, 6]])
def test_damaged_checkpoints_are_not_counted_among_those_that_are_kept(tmp_path: Path, damaged: list[int]) -> None:
    """Three may be there after a kill before the oldest is removed."""
    for step in (2, *damaged):
        checkpoint.save(tmp_path / str(step), Progress(step=step), {"x": torch.ones(1)})
        (tmp_path / str(step) / f"step-{step:08d}").rename(tmp_path / f"step-{step:08d}")
    for step in damaged:
        (tmp_path / f"step-{step:08d}" / checkpoint.TENSORS).write_bytes(b"damaged")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0].step == 2 and len(found[2]) == len(damaged)
    checkpoint.forget_later(tmp_path, found[0])
    checkpoint.save(tmp_path, Progress(step=4, validated_step=4), {"x": torch.ones(1)})
    assert [path.name for path in checkpoint.saved_checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000004-validated",
    ]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "adagrad"])
def test_an_optimizer_survives_the_trip(tmp_path: Path, name: str) -> None:
    section = OptimSection.model_validate({"optimizer": name, "momentum": 0.9 if name in ("sgd", "rmsprop") else 0.0})

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for n in range(count):
            optimizer.zero_grad()
            (model(torch.full((1, 3), 1.0 + n)) ** 2).sum().backward()
            optimizer.step()

    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(section, model)
    steps(model, optimizer, 3)
    checkpoint.save(tmp_path, Progress(step=3), checkpoint.pack_optimizer(optimizer))
    copied = nn.Linear(3, 2)
    copied.load_state_dict(model.state_dict())
    fresh = build_optimizer(section, copied)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    checkpoint.unpack_optimizer(fresh, found[1])
    steps(model, optimizer, 3)
    steps(copied, fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_going_on_from_a_damaged_newest_ends_with_the_same_bits(tmp_path: Path) -> None:
    alone, mended = tmp_path / "alone", tmp_path / "mended"
    train(parse_recipe(recipe_fields(0, alone)))
    train(parse_recipe(recipe_fields(0, mended)))
    for name in ("finished.json", "model.safetensors", "config.json"):
        (mended / name).unlink()
    newest = checkpoint.saved_checkpoints(mended / "checkpoints")[-1]
    (newest / checkpoint.TENSORS).write_bytes(b"damaged")
    (mended / "metrics.jsonl").open("a").write('{"step": 999}\n')  # a line of after the checkpoint
    train(parse_recipe(recipe_fields(0, mended)))
    assert outcome(mended) == outcome(alone)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_ends_a_run_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """At each of the six flushes of the third save: nothing is lost of what was saved before."""
    alone, refused = tmp_path / "alone", tmp_path / "refused"
    train(parse_recipe(recipe_fields(1, alone)))
    saves, flushes = 0, 0
    save, flush = checkpoint.save, checkpoint.flush

    def counted_save(*given: Any) -> None:
        nonlocal saves, flushes
        saves, flushes = saves + 1, 0
        save(*given)

    def refusing_flush(path: Path) -> None:
        nonlocal flushes
        if saves == 3 and flushes == number:
            raise OSError(code, os.strerror(code), str(path))
        flushes += 1
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", counted_save)
        patch.setattr(checkpoint, "flush", refusing_flush)
        with pytest.raises(CheckpointError, match=f"{os.strerror(code)}.*what was saved before is kept"):
            train(parse_recipe(recipe_fields(1, refused)))
    found = checkpoint.load_newest(refused / "checkpoints")
    assert found is not None and not found[2] and found[0].step >= 10
    train(parse_recipe(recipe_fields(1, refused)))
    assert outcome(refused) == outcome(alone)


def test_a_file_that_may_not_grow_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    """A limit of the system's own, which the library that writes tensors meets as well."""
    made = recipe_fields(1, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")

    def run_limited(size: int, command: str, path: Path) -> str:
        """The error of a command whose files may not grow beyond so many bytes."""
        limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        call = f"from training.__main__ import main; sys.exit(main(['{command}', sys.argv[1]]))"
        done = subprocess.run(
            [sys.executable, "-c", limit + call, str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "could not be written to" in run_limited(20_000, "train", tmp_path / "recipe.yaml")
    train(parse_recipe(made))
    error = run_limited(10, "evaluate", tmp_path / "run")
    assert error.startswith("error: ") and os.strerror(errno.EFBIG) in error


def test_damaged_checkpoints_are_never_loaded() -> None:
    """300 of them; `make kill-storm` does 10,000."""
    assert corrupt(300).total() == 300


def test_a_shorter_log_than_the_checkpoint_says_is_an_error(tmp_path: Path) -> None:
    train(parse_recipe(recipe_fields(1, tmp_path)))
    (tmp_path / "finished.json").unlink()
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        train(parse_recipe(recipe_fields(1, tmp_path)))


def test_killed_runs_end_like_one_left_alone() -> None:
    """12 kills by SIGKILL over all phases; `make kill-storm` does 100."""
    # In a process of its own, since it forks: that of the tests has threads.
    command = [sys.executable, "-m", "tests.training.kill_storm", "--kills", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["kills"].values()) >= 10 and set(result["kills"]) == set(ENTERED) and result["equal"]
