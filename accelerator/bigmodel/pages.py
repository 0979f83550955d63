"""Memory that is a file: tensors whose pages come from a mapping, brought in ahead and given back.

Reading a mapped tensor brings its pages in, one fault after the other; they then count as memory of the process
until they are given back. Mappings are private: a page that was written to is a copy of its own, which the file
does not have, so those are never given back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from array import array
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_WILLNEED, _DONTNEED, _POPULATE_READ = 3, 4, 22  # of Linux
_PRESENT, _OF_FILE = 1 << 63, 1 << 61  # bits of /proc/self/pagemap


@dataclass(frozen=True)
class FileMappings:
    """Where in this process's memory files are mapped, as it was when this was read."""

    starts: list[int]
    ends: list[int]

    @classmethod
    def read(cls) -> FileMappings:
        """The mappings of this moment; none where the kernel does not tell (not Linux)."""
        starts, ends = [], []
        if sys.platform == "linux":
            with open("/proc/self/maps", "rb") as lines:
                for line in lines:
                    fields = line.split(maxsplit=5)
                    if len(fields) == 6 and fields[4] != b"0" and not fields[5].startswith((b"/dev/", b"/memfd")):
                        start, end = fields[0].split(b"-")
                        starts.append(int(start, 16))
                        ends.append(int(end, 16))
        return cls(starts, ends)

    def hold(self, tensor: Tensor) -> bool:
        """Whether all of `tensor` lies in a mapped file."""
        if tensor.device.type != "cpu" or not tensor.nbytes:
            return False
        start, end = _span(tensor)
        index = bisect_right(self.starts, start) - 1
        while index >= 0 and start < end and self.starts[index] <= start < self.ends[index]:
            start = self.ends[index]
            index += 1
            if index == len(self.starts):
                break
        return start >= end


def bring_in(tensor: Tensor) -> None:
    """Have the pages of a mapped tensor in memory when this returns. The interpreter is free meanwhile."""
    start, end = _span(tensor)
    start, end = start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
    if not (_advise(start, end, _WILLNEED) and _advise(start, end, _POPULATE_READ)):
        _touch(tensor)


def give_back(tensor: Tensor) -> bool:
    """Give back the pages of a mapped tensor; they are read again when they are used. Not Linux: does nothing.

    Returns `False`, and keeps them, if any of them was written to, in whatever way.
    """
    start, end = _span(tensor)
    start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE  # the pages at the ends are also of others
    if start >= end or sys.platform != "linux":
        return True
    if _is_written(start, end):
        return False
    _advise(start, end, _DONTNEED)
    return True


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _advise(start: int, end: int, advice: int) -> bool:
    # Through ctypes, which lets other threads run during the call; mmap.madvise does not, and belongs to one mapping.
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0)


def are_in_memory(tensor: Tensor) -> bool:
    """Whether the pages of a mapped tensor are, judged by one in the middle, which takes no time."""
    start, end = _span(tensor)
    if end - start < 2 * _PAGE:
        return False  # it may have no whole page, and nothing would be given back
    entries = _entries((start + end) // 2 // _PAGE, 1)
    return entries is None or bool(entries[0] & _PRESENT)


def _is_written(start: int, end: int) -> bool:
    read = _entries(start // _PAGE, (end - start) // _PAGE)
    if read is None:
        return True  # nobody can tell
    entries = torch.frombuffer(read, dtype=torch.int64)
    of_file = torch.bitwise_and(entries, _OF_FILE) != 0
    there = (entries < 0) | torch.bitwise_and(entries, 1 << 62).ne(0)  # present (the sign), or swapped out
    return bool((there & ~of_file).any())


def _entries(first: int, count: int) -> array[int] | None:
    """What the kernel says of some pages of this process; `None` if it does not."""
    try:
        file = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return None
    try:
        read = os.pread(file, count * 8, first * 8)
    finally:
        os.close(file)
    return array("q", read) if len(read) == count * 8 else None


def _touch(tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.is_contiguous() else tensor.detach()
    flat[::_PAGE].sum() if tensor.is_contiguous() else flat.sum()
