"""A thread that does what must not hold up the loop, in the order in which it was asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, Full, Queue

_log = logging.getLogger("accelerator")
_MOST = 10_000
_SECONDS_TO_END = 60.0


class Background:
    """Calls functions one after the other in a thread of its own, which the first of them starts.

    What a function raises is logged and ends nothing. At most 10,000 calls wait; more are dropped, with a warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: Queue[Callable[[], None] | None] = Queue(_MOST)
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Have `call` done; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except Full:
            if not self._dropped:
                _log.warning("%s: %d records wait to be written; more are dropped until some are", self._name, _MOST)
            self._dropped += 1

    def close(self) -> None:
        """Return when everything is done, or after a minute, with a warning that says how much was not."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            self._calls.put(None, timeout=_SECONDS_TO_END)
            thread.join(_SECONDS_TO_END)
        except Full:
            pass
        if thread.is_alive():
            _log.warning("%s: %d records were not written within a minute", self._name, self._calls.qsize())
            self._empty()
        if self._dropped:
            _log.warning("%s: %d records were dropped", self._name, self._dropped)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # SystemExit too, of whatever is called: nothing may end for it
                _log.warning("%s: %s: %s", self._name, type(error).__name__, error)

    def _empty(self) -> None:
        try:
            while True:
                self._calls.get_nowait()
        except Empty:
            return
