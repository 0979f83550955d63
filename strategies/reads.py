"""Find the lines that read values from a device, by looking at every operation of one window."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_OURS = str(Path(__file__).resolve().parent)
_SKIPPED = (
    _OURS,
    str(Path(_OURS).with_name("accelerator")),
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
)


def line_of_the_loop() -> str:
    """The innermost line that runs now and is neither ours nor an installed package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class ReadingLines(TorchDispatchMode):
    """The lines that read values between `begin` and `end`, by `num_read`, which counts reads of the process.

    torch hides what `print` and `repr` do from modes: `next_line` is that of the first operation after such a read.
    """

    def __init__(self, num_read: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.lines: list[str] = []
        self.next_line = ""
        self._num_read = num_read
        self._seen = 0

    def begin(self) -> None:
        """Look at every operation from now on."""
        self._seen = self._num_read()
        self.__enter__()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Leave out what was read until now."""
        self.lines.clear()
        self.next_line = ""
        self._seen = self._num_read()

    def end(self) -> bool:
        """Stop looking. False if a mode that the loop has entered since must be left first."""
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._num_read()
        if before > self._seen and not self.next_line:
            self.next_line = line_of_the_loop()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._seen = self._num_read()
            if self._seen > before:
                self.lines.append(line_of_the_loop())
