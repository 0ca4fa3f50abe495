"""Ctrl-C that waits until what is under way can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = signal.SIGINT, signal.SIGTERM  # of a terminal, and of whatever stops a container


@contextmanager
def interrupts_wait(alone: bool = True) -> Iterator[threading.Event]:
    """Within it a first Ctrl-C or SIGTERM only sets the event; a second one raises KeyboardInterrupt at once.

    alone: False for one of several processes that save together, which nobody may leave by himself: nothing is changed
    there, nor in threads other than the main one, which get no signals.
    """
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    if not alone or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
