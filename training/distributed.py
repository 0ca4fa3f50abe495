"""Ray Train: starts the workers of a run, on this machine or a cluster, and begins again where one of them is lost.

Only this file knows Ray Train. What is trained, what is saved and how a run goes on is for what each worker is given to
do; Ray keeps no checkpoint of its own.
"""

import io
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
    get_context,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from rich.console import Console

from seqmodels.errors import SeqModelsError
from training.cluster import enter_folder, needs, ray_running, set_handler
from training.config import Recipe
from training.reporter import Reporter
from training.screen import screen
from training.workers import Workers

MAX_FAILURES = 8  # so often a worker may be lost in one call
# Ray notices by itself when a worker dies. This is for those that wait, and a validation may take long.
TIMEOUT_S = 7 * 24 * 3600


class WorkersLostError(SeqModelsError):
    """Workers died again and again."""


# A worker's part of a run: itself, the recipe, and what makes the Reporter of the first -> the run's directory.
Work = Callable[[Workers, Recipe, Callable[[Path], Reporter]], Path]


def train_together(recipe: Recipe, work: Work) -> Path:
    """A run by `run.workers` processes, on this machine or on the cluster that the environment variable RAY_ADDRESS
    names. Raises what `work` does, ConfigError where there is no room for so many, and WorkersLostError."""
    assert recipe.run.output_dir is not None
    directory = Path(recipe.run.output_dir)
    storage = directory.absolute() / ".ray"
    on_gpu, needed = recipe.run.device == "cuda", needs(recipe)
    with ray_running(recipe.run.workers, needed), _voice() as voice:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"work": work, "recipe": recipe, "folder": str(Path.cwd()), "voice": voice},
            torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=TIMEOUT_S),
            scaling_config=ScalingConfig(num_workers=recipe.run.workers, use_gpu=on_gpu, resources_per_worker=needed),
            run_config=RunConfig(
                name="train",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[_NoSecondTry()],
            ),
        )
        try:
            _fit(trainer)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    return directory


def _work(given: dict[str, Any]) -> None:
    """What each worker runs."""
    enter_folder(given["folder"])
    context = get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size())
    given["work"](workers, given["recipe"], lambda directory: Reporter(directory, given["voice"].console()))


class _NoSecondTry(UserCallback):  # type: ignore[misc]
    """Ray begins again after any error; but what the user has to mend would only go wrong again."""

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, SeqModelsError):
                raise error


def _fit(trainer: TorchTrainer) -> None:
    """Until the end. Raises the user's error, if it was one; KeyboardInterrupt on Ctrl-C, with all workers ended."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # what Ray makes of Ctrl-C
        raise KeyboardInterrupt from None
    except ControllerError as error:
        if isinstance(error.controller_failure, SeqModelsError):
            raise error.controller_failure from None
        raise
    except WorkerGroupError as error:
        if any(isinstance(failure, RayError) for failure in error.worker_failures.values()):
            raise WorkersLostError(
                f"workers died {MAX_FAILURES + 1} times, perhaps for want of memory; the same command goes on from the "
                "last checkpoint"
            ) from error
        raise
    finally:
        set_handler(signal.SIGINT, on_interrupt)  # Ray has put its own there


# What the first worker says appears where the command was given


class _Voice(io.StringIO):
    """Carries what is written to it in a worker to the program that started the workers."""

    def __init__(self, queue: Queue, look: dict[str, Any]) -> None:
        super().__init__()
        self._queue, self._look = queue, look

    def console(self) -> Console:
        return Console(file=self, highlight=False, soft_wrap=True, **self._look)

    def write(self, text: str) -> int:
        self._queue.put(text)
        return len(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Voice, (self._queue, self._look)


@contextmanager
def _voice() -> Iterator[_Voice]:
    """A voice that is heard here, in a terminal's look where this is one."""
    here = screen()
    look = {"force_terminal": here.is_terminal, "width": here.width, "color_system": here.color_system}
    queue = Queue(actor_options={"num_cpus": 0})
    ear = threading.Thread(target=_hear, args=(queue, here.file), daemon=True)
    ear.start()
    try:
        yield _Voice(queue, look)
        queue.put(None)
        ear.join()
    finally:
        queue.shutdown(force=True)


def _hear(queue: Queue, output: IO[str]) -> None:
    try:
        while (text := queue.get()) is not None:
            output.write(text)
            output.flush()
    except RayError:  # the queue is gone, with what would have spoken
        pass
