"""Files of JSON lines that a run appends to, goes on with after a resume, and that are read though cut short."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class LineFile:
    """One file of JSON objects, one to a line, written by one process.

    Each run has a file of its own: what an earlier one left is moved aside (`log.1.jsonl`) when the first line is
    written, unless `resume` said that this run goes on with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.TextIOWrapper | None = None
        self._aside: Path | None = None

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append, and hand the lines to the system. Raises `OSError`."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                self._aside = _free_name(self.path)
                self.path.rename(self._aside)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write("".join(_line(record) for record in records))
        self._file.flush()

    def resume(self, step: int) -> None:
        """Go on after `step` of the optimizer: lines of later steps, which will be written again, leave the file.

        They are moved to a file beside it (`log.1.jsonl`), which the line that says so names. Events stay. What this
        process has written before, to a file of its own, follows the earlier run's. A line is later by its
        `optimizer_steps`, and where it has none by its `step`.
        """
        own = read_lines(self.path) if self._aside is not None else []
        before = read_lines(self._aside or self.path)
        kept = [record for record in before if not _is_after(record, step)]
        cut = [record for record in before if _is_after(record, step)]
        mark = {"event": "resumed", "step": step, "time": time.time(), "dropped": len(cut)}
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if cut:
            backup = _free_name(self.path)
            self._replace(backup, cut)
            mark["moved_to"] = backup.name
        self._replace(self.path, [*kept, mark, *own])
        if self._aside is not None:
            self._aside.unlink()
            self._aside = None
        self._file = self.path.open("a", encoding="utf-8")

    def _replace(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Write a whole file, so that a kill leaves the old one or the new one."""
        hidden = self.path.with_name(f".{self.path.name}.writing")
        hidden.write_text("".join(_line(record) for record in records), encoding="utf-8")
        os.replace(hidden, path)

    def close(self) -> None:
        """Close the file; writing again would begin another run's."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file. A line that a killed process left unfinished is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_strict(record), allow_nan=False, separators=(",", ":")) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text, which `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_after(record: Mapping[str, Any], step: int) -> bool:
    if "event" in record:
        return False
    found = record.get("optimizer_steps", record.get("step"))
    return isinstance(found, int) and found > step


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
