"""Where the workers of this process's DataLoaders are: each writes its stack when it is asked by a signal."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import tempfile
import time
from contextlib import suppress
from itertools import takewhile

from .position import is_of_the_script

_ASK = getattr(signal, "SIGRTMIN", 0) + 5  # one that scripts and libraries leave alone; not on macOS
_SECONDS = 1.0
_MOST_FRAMES = 100  # that faulthandler writes
_WORKER = os.path.join("torch", "utils", "data", "_utils", "worker.py")
_FETCH = os.path.join("torch", "utils", "data", "_utils", "fetch.py")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


class Workers:
    """Has every worker that is forked from now on answer with its stack, also inside of C or of a lock.

    The handler and the file are inherited with the fork, so that `worker_init_fn` is left to the script; workers that
    are started in another way (`spawn`, `forkserver`) do not answer.
    """

    def __init__(self) -> None:
        self._answers = tempfile.TemporaryFile() if hasattr(signal, "SIGRTMIN") else None  # noqa: SIM115
        if self._answers is not None:
            faulthandler.register(_ASK, file=self._answers, all_threads=False)

    def places(self) -> str:
        """The lines of the script, or else of the library, in which workers are; empty if none reads a sample.

        A worker that does not answer ends by the signal: to be asked when all processes end.
        """
        found = []
        for child in multiprocessing.active_children():
            if child.daemon and child.pid is not None and (place := _place(self._ask(child.pid))):
                found.append(place)
        return " and ".join(dict.fromkeys(found))

    def close(self) -> None:
        """Stop listening in this process."""
        if self._answers is not None:
            faulthandler.unregister(_ASK)
            self._answers.close()
            self._answers = None

    def _ask(self, pid: int) -> str:
        if self._answers is None:
            return ""
        begin = length = os.fstat(self._answers.fileno()).st_size
        with suppress(OSError):  # it has ended
            os.kill(pid, _ASK)
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.02)
            before, length = length, os.fstat(self._answers.fileno()).st_size
            if before == length > begin:
                break
        return os.pread(self._answers.fileno(), length - begin, begin).decode(errors="replace")


def _place(stack: str) -> str:
    """The innermost line of the script; of a worker that reads without one, the innermost line of all."""
    frames = [found.groups() for found in _FRAME.finditer(stack)]  # innermost first; those of the parent follow
    if len(frames) < _MOST_FRAMES and not any(path.endswith(_WORKER) for path, _, _ in frames):
        return ""  # a process of the script's own
    frames = list(takewhile(lambda frame: not frame[0].endswith(_WORKER), frames))
    candidates = [frame for frame in frames if is_of_the_script(frame[0])]
    if not candidates and any(path.endswith(_FETCH) for path, _, _ in frames):
        candidates = frames
    return "{}:{} in {}".format(*candidates[0]) if candidates else ""  # else it waits for something to do
