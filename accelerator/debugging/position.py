"""Where a thread is: the line of the user's file, the collective it waits in, and what it brought there."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

import strategies
from strategies.tree import describe

_OURS = tuple(
    os.path.dirname(os.path.realpath(str(path))) + os.sep for path in (strategies.__file__, os.path.dirname(__file__))
)
_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in dict.fromkeys((os.path.dirname(torch.__file__), *sysconfig.get_paths().values()))
    if path and os.path.realpath(path) not in (sys.prefix, sys.base_prefix)
)
_DDP = os.path.join("torch", "nn", "parallel", "distributed.py")  # its collectives have no frames of their own
_LOADER = os.path.join("torch", "utils", "data", "dataloader.py")
_WAITS = frozenset({"_get_data", "_try_get_data"})
FOR_A_WORKER = ", waiting for a batch of a DataLoader's worker"
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
_BROUGHT = ("tensor", "input_tensor", "input", "input_list", "tensor_list", "input_tensor_list", "scatter_list")
_NO_COLLECTIVES = frozenset({"init_process_group", "destroy_process_group", "wrapper", "func_return"})
_HEADERS = frozenset({"all_gather_integers", "all_gather_objects"})
_SAID_AS = {
    "__enter__": "accumulate",
    "iterate": "next batch",
    "__call__": "forward",
    "first": "main_process_first",
}


@dataclass(frozen=True)
class Position:
    """`where` is file, line and function; `waits_in` a collective, or empty; `brought` the tensors given to it.

    `inside` is the method of this library that the line called, or empty.
    """

    where: str
    waits_in: str = ""
    brought: str = ""
    inside: str = ""


def stack_of(thread: int) -> list[FrameType]:
    """The frames of a thread, innermost first; none if it has ended. Hold them no longer than needed."""
    frame = sys._current_frames().get(thread)
    return list(_outwards(frame))


class Waits:
    """Counts the calls of one thread in which it waited and that have ended, as far as Linux tells.

    `thread` is its native id; `None` to count nothing: drivers of accelerators wait in ways of their own.
    """

    def __init__(self, thread: int | None) -> None:
        self._path = Path(f"/proc/self/task/{thread}/status")
        self._counts = thread is not None and self._path.exists()

    def ended(self, frames: list[FrameType]) -> int:
        """How many until now, for a thread that is in a line of the script; else 0.

        What waits inside torch or an installed package (queues of workers, collectives) may wake up again and again.
        """
        if not self._counts or not frames or not is_of_the_script(frames[0].f_code.co_filename):
            return 0
        with contextlib.suppress(OSError):  # the thread has ended
            for line in self._path.read_text().splitlines():
                name, _, count = line.partition(":")
                if name == "voluntary_ctxt_switches":
                    return int(count)
        return 0


def is_of_the_script(path: str) -> bool:
    """Whether a file is neither of torch, nor of this library, nor of an installed one."""
    return not _is_within(path, (*_OURS, *_LIBRARIES))


def signature(frames: list[FrameType]) -> tuple[tuple[int, int], ...]:
    """Which instructions the frames are at: the same as long as a thread does not move."""
    return tuple((id(frame.f_code), frame.f_lasti) for frame in frames)


def locate(frames: list[FrameType], *, detailed: bool = False) -> Position:
    """The innermost line that is neither of torch, nor of this library, nor of an installed one; what it called.

    `detailed` also looks into local variables, for the tensors.
    """
    inside: list[FrameType] = []
    for frame in frames:
        path = frame.f_code.co_filename
        if is_of_the_script(path):
            where = f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
            if any(one.f_code.co_filename.endswith(_LOADER) and one.f_code.co_name in _WAITS for one in inside):
                where += FOR_A_WORKER
            return Position(where, *_collective(inside, detailed=detailed))
        inside.append(frame)
    return Position("no line of the script: it ended, or has not begun", *_collective(inside, detailed=detailed))


def _collective(inside: list[FrameType], *, detailed: bool) -> tuple[str, str, str]:
    """Its name, as the script and as torch call it, what this rank brought, and the method; frames innermost first.

    What was brought to a method of ours is its `tree`: what torch got may be a header that goes before.
    """
    names, brought, is_backward = [], "", False
    operation = "DistributedDataParallel" if inside and inside[0].f_code.co_filename.endswith(_DDP) else ""
    for frame in inside:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if _is_within(path, _OURS):
            names.append(_SAID_AS.get(name, name))
            if name in _HEADERS:
                brought = ""
            if detailed and "tree" in (variables := frame.f_locals):
                brought = describe(variables["tree"])
        elif path.endswith(_COLLECTIVES) and not name.startswith("_") and name not in _NO_COLLECTIVES:
            operation = name
            brought = _brought(frame) if detailed and not brought else brought
        is_backward |= name == "_engine_run_backward"
    called = names[-1] if names else ""
    if not operation and not is_backward:
        return "", "", called
    words = [word for word in (called, operation) if word]
    if is_backward and "backward" not in words:
        words.insert(0, "backward")
    return words[0] + (f" ({words[1]})" if len(words) > 1 and words[1] != words[0] else ""), brought, called


def _brought(frame: FrameType) -> str:
    variables = frame.f_locals
    for name in _BROUGHT:
        value = variables.get(name)
        if isinstance(value, Tensor) or (isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)):
            return describe(value)
    return ""


@cache
def _is_within(path: str, folders: tuple[str, ...]) -> bool:
    return path.startswith("<") or os.path.realpath(path).startswith(folders)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
