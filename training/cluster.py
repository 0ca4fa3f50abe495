"""Ray for as long as training needs it: that of a cluster, or one of our own on this machine."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from seqmodels.errors import ConfigError
from training.config import Recipe
from training.interrupts import termination_interrupts

# No statistics to Ray's makers, no folders, logs and tables of its own beside ours, and Ctrl-C is ours.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
OBJECT_STORE_BYTES = 128 * 1024**2  # on this machine; hardly anything goes through it


def needs(recipe: Recipe) -> dict[str, float]:
    """What one process that trains occupies."""
    return {"CPU": recipe.run.threads or 1, "GPU": int(recipe.run.device == "cuda")}


@contextmanager
def ray_running(count: int, needed: Mapping[str, float]) -> Iterator[None]:
    """Ray with room for so many processes, which need so much each: the one that this program runs already, or that of
    the environment variable RAY_ADDRESS, or one of our own, on this machine alone.

    What was begun here ends here, however it ends. Raises ConfigError where there is no room.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        _check_room(count, needed)
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    with termination_interrupts():
        try:
            _start(count, needed)
            set_handler(signal.SIGTERM, signal.default_int_handler)  # with Ray's own, the process would crash
            _check_room(count, needed)
            yield
        finally:
            ray.shutdown()
            set_handler(signal.SIGTERM, on_terminate)


def set_handler(number: int, handler: Any) -> None:
    """`signal.signal`, where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def enter_folder(folder: str) -> None:
    """A recipe's paths may be relative to where the command was given. Raises ConfigError."""
    try:
        os.chdir(folder)
    except OSError:
        raise ConfigError(f"a machine of the cluster has no folder {folder}; share it with all machines") from None


def _start(count: int, needed: Mapping[str, float]) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"RAY_ADDRESS is {address!r}, where no Ray cluster answers; start one, or unset it"
            ) from error
        return
    num_cpus = max(os.cpu_count() or 1, count * int(needed["CPU"]))  # room for what was asked, even on few cores
    ray.init("local", num_cpus=num_cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)


def _check_room(count: int, needed: Mapping[str, float]) -> None:
    """Ray would wait for ever. Raises ConfigError."""
    there = ray.cluster_resources()
    for kind, field in (("GPU", "device"), ("CPU", "threads")):
        if count * needed[kind] > there.get(kind, 0):
            raise ConfigError(
                f"{count} processes need {count * needed[kind]:g} {kind}s, but Ray has {there.get(kind, 0):g}; lower "
                f"their number, or change run.{field}"
            )
