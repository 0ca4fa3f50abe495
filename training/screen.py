"""Standard output as a run writes to it, which may outlast whoever reads it."""

import contextlib
import io
import os
import select
import signal
import sys
import threading
from typing import TextIO

from rich.console import Console


def screen() -> Console:
    """Where a run speaks to the person who began it."""
    stream = sys.stdout or io.StringIO()  # None where it was closed from the beginning
    return Console(file=_Output(stream), highlight=False, soft_wrap=True)  # type: ignore[arg-type]


class _Output:
    """A stream that cannot be written to any more, since its reader has left as `head` does, or its disk is full, is as
    Ctrl-C: what is under way can be saved. What is said after that goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._close(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._close(error)

    def _close(self, error: OSError) -> None:
        discard(self._stream)
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):  # where both go the same way
                print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # which a signal to this thread would not wake


def discard(stream: TextIO) -> None:
    """From now on, with what it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`. What it holds is discarded."""
    pipe = select.poll()
    try:
        pipe.register(sys.stdout.fileno(), 0)
    except (AttributeError, io.UnsupportedOperation):  # closed from the beginning, or in memory
        return False
    left = bool(pipe.poll(0))  # asked for nothing, it tells of errors alone
    if left:
        discard(sys.stdout)
    return left
