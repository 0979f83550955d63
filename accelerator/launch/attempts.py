"""A folder for each attempt at running the processes, and a line when another attempt begins."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest


class Attempts(DefaultLogsSpecs):
    """Torch calls `reify` each time it starts the processes, which makes it the place to say so."""

    def __init__(self, folder: str, max_restarts: int) -> None:
        super().__init__(log_dir=folder)
        self._max_restarts = max_restarts
        self._restarts: int | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the error files of one attempt; output goes where the launcher's own goes."""
        restarts = int(envs[0]["TORCHELASTIC_RESTART_COUNT"])
        if self._restarts is not None:
            why = "the nodes of the job changed" if restarts == self._restarts else "a process failed"
            print(
                f"accelerator launch: {why}; all processes start again (restart {restarts} of {self._max_restarts})",
                file=sys.stderr,
                flush=True,
            )
        self._restarts = restarts
        return super().reify(envs)
