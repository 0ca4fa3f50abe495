"""Ctrl-C that waits until what is under way can be saved."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATIONS = signal.SIGTERM, signal.SIGHUP  # of whatever stops a container, and of a terminal that is closed


@contextmanager
def interrupts_wait(alone: bool = True) -> Iterator[threading.Event]:
    """Within it a first Ctrl-C, SIGTERM or SIGHUP only sets the event; a second one raises KeyboardInterrupt at once.

    alone: False for one of several processes that save together, which nobody may leave by himself: nothing is changed
    there, nor in threads other than the main one, which get no signals.
    """
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    with _handled(note, (signal.SIGINT, *TERMINATIONS) if alone else ()):
        yield came


@contextmanager
def termination_interrupts(alone: bool = True) -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does. alone: see `interrupts_wait`."""
    with _handled(signal.default_int_handler, TERMINATIONS if alone else ()):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals that are ignored, as a shell arranges for what runs in the background, stay ignored. A closed terminal
    counts once: the system says so, then the shell, and the system again when the shell ends."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        handler(number, frame)

    may = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if may}
    ours = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in ours.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, old)
