"""Train recipes by as many processes as each asks for, without Ray: forked, and joined by a process group.

    python -m tests.training.together RECIPE.json ...

Beside its run each worker leaves `weights-RANK`: the digest of its weights at the end, which must be the same for all.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from training.loop import Trainer
from training.parsing import parse_recipe
from training.run import train_as
from training.workers import Workers

ROOT = Path(__file__).parent.parent.parent
PR_SET_PDEATHSIG = 1


def start(*recipes: dict[str, Any]) -> None:
    """The above, from a program that must not fork."""
    paths = []
    for fields in recipes:
        path = Path(fields["run"]["output_dir"]).with_suffix(".json")
        path.write_text(json.dumps(fields), encoding="utf-8")
        paths.append(str(path))
    command = [sys.executable, "-m", "tests.training.together", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def train(fields: dict[str, Any]) -> None:
    """Fork the other workers, which die with this process, and be the first."""
    recipe = parse_recipe(fields)
    size = recipe.run.workers
    if size == 1:
        train_as(Workers(), recipe)
        return
    with tempfile.TemporaryDirectory() as folder:
        rank = next((rank for rank in range(1, size) if os.fork() == 0), 0)
        if rank == 0:
            _train_as(rank, size, folder, fields)
            assert all(os.wait()[1] == 0 for _ in range(1, size)), "a worker failed"
            return
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _train_as(rank, size, folder, fields)
            code = 0
        finally:
            os._exit(code)


def _train_as(rank: int, size: int, folder: str, fields: dict[str, Any]) -> None:
    timeout = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/store", timeout, size, rank)
    train_as(Workers(rank, size), parse_recipe(fields))
    distributed.destroy_process_group()


def leave_digests() -> None:
    run = Trainer.run

    def digested(trainer: Trainer) -> Path:
        result = run(trainer)
        weights = b"".join(tensor.numpy().tobytes() for tensor in trainer.model.state_dict().values())
        digest = hashlib.sha256(weights).hexdigest()
        (trainer.directory / f"weights-{trainer.workers.rank}").write_text(digest, encoding="ascii")
        return result

    Trainer.run = digested  # type: ignore[method-assign]


def main() -> int:
    torch.set_num_threads(1)
    leave_digests()
    for path in sys.argv[1:]:
        train(json.loads(Path(path).read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
