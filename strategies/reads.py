"""Find the lines that read values from a device, by looking at every operation of one window."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_OURS = str(Path(__file__).resolve().parent)
_SKIPPED = (
    _OURS,
    str(Path(_OURS).with_name("accelerator")),
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
)
_READING = ("_local_scalar_dense", "nonzero", "equal")


def line_of_the_loop() -> str:
    """The innermost line that runs now and is neither ours nor an installed package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class ReadingLines(TorchDispatchMode):
    """The lines that read values between `begin` and `end`, but for `print`, which torch hides from modes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.lines: list[str] = []

    def begin(self) -> None:
        """Look at every operation from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> bool:
        """Stop looking. False if a mode that the loop has entered since must be left first."""
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # Evaluation reads what it likes.
        to_cpu = name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and args[0].device.type == "xla"
        if torch.is_grad_enabled() and (to_cpu or (name in _READING and args[0].device.type == "xla")):
            self.lines.append(line_of_the_loop())
        return func(*args, **kwargs)
