"""Whose the checkpoints of a folder are: which run wrote each, and from which one that run went on.

Every run has an id of its own, new in every process, and in every folder a lineage: that of the checkpoint there that
it went on from, else a new one. Retention deletes within a lineage; and what another run has written to the folder
since this one last looked is the work of a second job.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.errors import StateError

from . import folder as folders

_log = logging.getLogger("accelerator")
Mark = tuple[str, int, int]


class Lineage:
    """What a run is known by, and the checkpoints that it knows of, by folder. Rank 0's counts."""

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex
        self._lineages: dict[Path, str] = {}
        self._seen: dict[Path, set[Mark]] = {}
        self._written: set[Path] = set()

    def about(self, parent: Path) -> dict[str, str]:
        """What a manifest of a checkpoint in `parent` says of the run."""
        return {"run": self._run, "lineage": self._lineages.get(parent, self._run)}

    def look(self, parent: Path) -> None:
        """Know of what is in `parent` now."""
        self._seen[parent] = _marks(parent)

    def loaded(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """The run goes on from this checkpoint."""
        self._lineages[path.parent] = manifest.get("lineage", self._run)

    def check(self, parent: Path) -> None:
        """Raise `StateError` if another run writes to `parent`; warn once if it holds one that was not gone on with."""
        marks = _marks(parent)
        for name, _, _ in sorted(marks - self._seen.setdefault(parent, marks), reverse=True):
            if _run_of(parent / name) != self._run:
                raise StateError(
                    f"another job has written {name} into {str(parent)!r} since this one began, saved or loaded there "
                    "last: two that train in one folder mix their checkpoints. End one of them, or give each its own; "
                    "resume() goes on from what is there."
                )
        if marks and parent not in self._written and parent not in self._lineages:
            _log.warning(
                "%s holds checkpoints of another run, which was not gone on with: those of the same steps are "
                "replaced, and the others stay. resume() or load_state() goes on with it.",
                parent,
            )
        self._written.add(parent)


def _marks(parent: Path) -> set[Mark]:
    """What tells each checkpoint in `parent` from any other that may take its name."""
    found: set[Mark] = set()
    for path in [*folders.all_in(parent), *parent.glob(f"{folders.OLD}*")]:  # a kill can leave one half exchanged
        try:
            status = (path / folders.MANIFEST).stat()
        except OSError:  # a broken one, or deleted just now
            continue
        found.add((path.name.removeprefix(folders.OLD), status.st_mtime_ns, status.st_ino))
    return found


def _run_of(path: Path) -> Any:
    try:
        return json.loads((path / folders.MANIFEST).read_text())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
