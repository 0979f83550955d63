"""A folder for each attempt at running the processes, and a line when another attempt begins."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from .report import how_it_ended


class Attempts(DefaultLogsSpecs):
    """Torch calls `reify` each time it starts the processes, which makes it the place to say so."""

    def __init__(self, folder: str, max_restarts: int, failures: FirstFailure) -> None:
        super().__init__(log_dir=folder)
        self._max_restarts = max_restarts
        self._failures = failures
        self._restarts: int | None = None
        self._ranks: dict[int, str] = {}  # by local rank, of the attempt that runs

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the error files of one attempt; output goes where the launcher's own goes."""
        restarts = int(envs[0]["TORCHELASTIC_RESTART_COUNT"])
        if self._restarts is not None:
            why = "the nodes of the job changed" if restarts == self._restarts else self._failures.take(self._ranks)
            print(
                f"accelerator launch: {why}; all processes start again (restart {restarts} of {self._max_restarts})",
                file=sys.stderr,
                flush=True,
            )
        self._restarts = restarts
        self._ranks = {local_rank: variables["RANK"] for local_rank, variables in envs.items()}
        return super().reify(envs)


class FirstFailure(logging.Filter):
    """Keeps which process of this node failed first: the agent tells nobody but its log, for which this is a filter.

    It also wakes each process that the agent is about to end: one that is stopped (SIGSTOP, ctrl-z) would not heed the
    agent's SIGTERM, and hold the job until the agent kills it, 30 seconds later.
    """

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._seen: tuple[int, int] | None = None  # local rank and exit code

    def filter(self, record: logging.LogRecord) -> bool:
        """Note a failure, wake a process that is to end; let the record pass unless the log is to be quiet."""
        if str(record.msg).startswith("Sending process %s closing signal") and isinstance(record.args, tuple):
            leader = record.args[0]
            if isinstance(leader, int):
                with contextlib.suppress(OSError):  # it is gone
                    os.killpg(leader, signal.SIGCONT)
        if str(record.msg).startswith("failed (exitcode: %s) local_rank: %s") and isinstance(record.args, tuple):
            exit_code, local_rank = record.args[:2]
            if isinstance(exit_code, int) and isinstance(local_rank, int):
                self._seen = local_rank, exit_code
        return not self._quiet

    def take(self, ranks: Mapping[int, str]) -> str:
        """Say which rank ended, and how, and forget it."""
        seen, self._seen = self._seen, None
        if seen is None:
            return "a process of another node failed"
        local_rank, exit_code = seen
        return f"rank {ranks[local_rank]} failed ({how_it_ended(exit_code)})"
