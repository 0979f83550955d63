"""Whose the checkpoints of a folder are: which run wrote each, and which ones that run went on from.

Every run has an id of its own, the first part of which is that of its process, and a lineage: the ids of the runs that
it went on from, and its own. Retention deletes what the runs of its lineage wrote; and what a run of another process
has written to the folder since this one last looked is the work of a second job.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from strategies.errors import StateError

from . import folder as folders

_log = logging.getLogger("accelerator")
Mark = tuple[str, int, int]


class _Written(NamedTuple):
    """What the manifest of a checkpoint is known by, and the run that wrote it; `None` where it cannot be read."""

    digest: str | None
    run: str | None


class Lineage:
    """What a run is known by, and the checkpoints that it knows of, by folder. Rank 0's counts."""

    def __init__(self) -> None:
        self._process = _this_process()
        self._run = f"{self._process}-{uuid.uuid4().hex}"
        self._runs: list[str | None] = [self._run]
        self._seen: dict[Path, dict[Mark, _Written]] = {}
        self._saved_to: set[Path] = set()

    def about(self) -> dict[str, Any]:
        """What a manifest says of the run."""
        return {"run": self._run, "lineage": self._runs}

    def look(self, parent: Path) -> None:
        """Know of what is in `parent` now. What may not be listed is looked at when it is written to."""
        try:
            self._seen[parent] = _marks(parent, self._seen.get(parent, {}))
        except OSError:
            self._seen.pop(parent, None)

    def loaded(self, manifest: Mapping[str, Any]) -> None:
        """The run goes on from this checkpoint, and so from the runs that it went on from."""
        runs = manifest.get("lineage", [None])  # without one: of a release that noted no runs
        self._runs = [*dict.fromkeys(str(run) if run is not None else None for run in (*runs, self._run))]

    def check(self, parent: Path) -> None:
        """Raise `StateError` if another job writes to `parent`; warn once if it holds nothing that was gone on with."""
        now = _marks(parent, self._seen.get(parent, {}))
        before = self._seen.setdefault(parent, now)
        known = {None, *(written.digest for written in before.values())}  # copied back, it has another time
        for (name, _, _), (digest, run) in sorted(now.items(), reverse=True):
            if digest not in known and not str(run).startswith(self._process):
                raise StateError(
                    f"another job has written {name} into {str(parent)!r} since this one began, saved or loaded there "
                    "last: two that train in one folder mix their checkpoints. End one of them, or give each its own; "
                    "resume() goes on from what is there."
                )
        if now and parent not in self._saved_to and not any(run in self._runs for _, run in now.values()):
            _log.warning(
                "%s holds checkpoints of another run, which was not gone on with: those of the same steps are "
                "replaced, and the others stay. resume() or load_state() goes on with it.",
                parent,
            )
        self._saved_to.add(parent)


def _marks(parent: Path, before: Mapping[Mark, _Written]) -> dict[Mark, _Written]:
    """What tells each checkpoint in `parent` from any other that may take its name; those of `before` are not read."""
    found: dict[Mark, _Written] = {}
    for path in [*folders.all_in(parent), *parent.glob(f"{folders.OLD}*")]:  # a kill can leave one half exchanged
        try:
            status = (path / folders.MANIFEST).stat()
        except OSError:  # a broken one, or deleted just now
            continue
        mark = path.name.removeprefix(folders.OLD), status.st_mtime_ns, status.st_ino
        found[mark] = before[mark] if mark in before else _written(path)
    return found


def _written(path: Path) -> _Written:
    try:
        manifest = json.loads((path / folders.MANIFEST).read_text())
        return _Written(str(manifest["digest"]), manifest.get("run"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Written(None, None)


def _this_process() -> str:
    """What tells this process from any other of any machine: its id is used again, and containers share names."""
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no Linux
        started = ""
    return folders.digest_of({"machine": platform.node(), "process": os.getpid(), "started": started})
