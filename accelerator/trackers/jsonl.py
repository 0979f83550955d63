"""The tracker that is always there: `log.jsonl` in the folder of the run, a JSON object to a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelerator.lines import LineFile

from .tracker import Histogram, Image, Run, Table, Tracker, Value

FILE_NAME = "log.jsonl"


class JSONLines(Tracker):
    """One line to a call of `log`: `{"step": 3, "time": 1763712000.5, "values": {"loss": 0.25}}`. Keeps no images.

    `"optimizer_steps"` stands beside a `"step"` that is another number: a resume goes by it.
    `{"config": {...}}` holds settings; `{"event": "resumed", "step": 20, ...}` says where a run went on.
    A subclass with `all_ranks = True` writes `log-rank<rank>.jsonl` on each.
    """

    needs_folder: ClassVar[bool] = True

    def begin(self, run: Run) -> None:
        """Name the file, which its first line opens, or go on with it."""
        assert run.folder is not None
        name = f"log-rank{run.rank}.jsonl" if self.all_ranks else FILE_NAME
        self._file = LineFile(run.folder / name)
        if run.resumed is not None:
            self._file.resume(run.resumed)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """One line with all of it."""
        self._file.write([{"config": config}])

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """One line."""
        kept = {name: _plain(value) for name, value in values.items() if not isinstance(value, Image)}
        if kept:
            own = {} if step == self.optimizer_steps else {"optimizer_steps": self.optimizer_steps}
            self._file.write([{"step": step, **own, "time": time, "values": kept}])
        return [name for name in values if name not in kept]

    def resume(self, step: int) -> None:
        """Take the lines of later steps out of the file, and add one that says so."""
        self._file.resume(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Value) -> Any:
    if isinstance(value, Histogram):
        counts, edges = value.counts()
        return {"counts": counts, "edges": edges}
    return {"columns": value.columns, "rows": value.rows} if isinstance(value, Table) else value
