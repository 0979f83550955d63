"""The end of what an Accelerator began: by a call, when it is let go of, or at exit. Failures are the exit code."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from strategies.accumulation import Accumulation

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .debugging import Debugging
    from .record import Record


class Ending:
    """Calls `end(*arguments)` once: when called, when `owner` is collected, or at exit.

    What it raises goes to the caller. Without one, Python would print it and exit with 0: then it is exit code 1.
    """

    def __init__(self, owner: object, end: Callable[..., None], *arguments: Any) -> None:
        self._end, self._arguments = end, arguments
        self._pid = os.getpid()
        self._failed = False
        self._finalizer = weakref.finalize(owner, self._unasked)
        self._finalizer.atexit = False
        atexit.register(self._at_exit)

    def __call__(self) -> None:
        """End now."""
        if self._finalizer.detach() is not None:
            atexit.unregister(self._at_exit)
            self._run()

    def _run(self) -> None:
        arguments, self._arguments = self._arguments, ()
        self._end(*arguments)

    def _unasked(self) -> None:
        try:
            self._run()
            atexit.unregister(self._at_exit)
        except Exception:
            traceback.print_exc()
            self._failed = True

    def _at_exit(self) -> None:
        self._finalizer()
        if self._failed and os.getpid() == self._pid:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # Python has no other way to change the code of an exit that has begun


def end_run(accumulation: Accumulation, record: Record, checkpoints: Checkpoints, debugging: Debugging) -> None:
    """Free what was wrapped, then leave: threads of a process group that outlive their models abort the exit."""
    try:
        checkpoints.close()
    finally:
        record.close()
        debugging.stop()
        accumulation.release()
        gc.collect()
        accumulation.strategy.teardown(accumulation.world)
