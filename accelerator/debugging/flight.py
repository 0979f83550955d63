"""The collective that a process has called and that has not ended, as torch's flight recorder knows it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from .position import is_of_the_script


def pending() -> str:
    """The oldest one, with its tensors and the line of the script that called it; empty if none is recorded.

    It also knows those that run beside Python: `async_op=True`, and all of NCCL. torch records the calls of gloo (2.13
    by itself, 2.9 with `TORCH_FR_BUFFER_SIZE`), and those of NCCL where it was built with it.
    """
    recorders = [getattr(torch._C._distributed_c10d, name, None) for name in ("_dump_nccl_trace", "_dump_fr_trace")]
    for dump in recorders:
        if dump is not None and _first_pending(dump, with_lines=False) is not None:
            entry = _first_pending(dump, with_lines=True)  # names of files take torch seconds, the first time
            return _words(entry) if entry is not None else ""
    return ""


def _first_pending(dump: Callable[..., bytes], *, with_lines: bool) -> dict[str, Any] | None:
    entries = pickle.loads(dump(includeStackTraces=with_lines))["entries"]  # bytes of this very process
    return next((entry for entry in entries if not entry["retired"] and entry["state"] != "completed"), None)


def _words(entry: dict[str, Any]) -> str:
    name = entry["profiling_name"].rpartition(":")[2]
    brought = zip(entry["input_sizes"], entry["input_dtypes"], strict=False)
    sizes = ", ".join(f"{tuple(size)} {dtype}" for size, dtype in brought)
    lines = [
        f"{frame['filename']}:{frame['line']} in {frame['name']}"
        for frame in entry.get("frames", ())
        if is_of_the_script(frame["filename"])
    ]
    return f"{name} of {sizes or 'nothing'}" + (f", called at {lines[0]}," if lines else "")
