"""How much memory this process may still take on its machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_on_host(root: Path = Path("/")) -> int:
    """Bytes that the machine can give away, within the limits of this process's control groups.

    `root`: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(min([free, *_left_in_groups(root)]), 0)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process, and each one above it, leaves to it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = mount / path.lstrip("/")  # inside a container it may not be there: then its root is the group
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _left_in(folder, limit, used, cache)


def _left_in(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        taken -= next((int(value) for name, value in pairs if name == cache), 0)  # given back when it is needed
    except (OSError, ValueError):  # not there, or "max"
        return
    yield most - taken
