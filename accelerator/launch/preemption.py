"""What a scheduler's warning becomes: SIGUSR1 is handed on to the processes, and their wish to be requeued up to it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .worker import REQUEUE


@contextlib.contextmanager
def handing_on(folder: Path) -> Iterator[None]:
    """Hand SIGUSR1 on to the processes of the attempt that runs; torch's agent does so with SIGTERM, and would die."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(number: int, frame: Any) -> None:
        marks = list(folder.rglob("pid"))
        newest = max(marks, key=lambda mark: mark.stat().st_mtime_ns, default=None)
        for mark in marks:
            if newest is not None and mark.parent.parent == newest.parent.parent:
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(int(mark.read_text()), number)

    before = signal.signal(signal.SIGUSR1, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def requeue_code(folder: Path) -> int | None:
    """The exit code that asks to be started again, if the processes saved and left with it."""
    return REQUEUE if any(folder.rglob("requeue")) else None
