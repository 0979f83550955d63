"""From the failures of a job to its cause: who failed first, in one line each, and one traceback in all."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


@dataclass(frozen=True)
class Failure:
    """One process that failed. `summary` and `traceback` are empty if it left no error file.

    `noticed` counts the failures in the order in which the agent saw them; `seconds` is when it happened.
    """

    rank: int
    exit_code: int
    noticed: int
    seconds: float
    summary: str = ""
    traceback: str = ""
    follow_up: bool = False

    @property
    def order(self) -> tuple[int, float]:
        """Causes sort before consequences: peers lose a connection, and the agent ends the rest by SIGTERM.

        If nothing but such consequences is left, the first one noticed is nearest to the cause: the agent sends
        SIGTERM only after it has noticed a failure.
        """
        if self.follow_up or self.exit_code == -signal.SIGTERM:
            return 1, self.noticed
        return 0, self.seconds

    @property
    def ending(self) -> str:
        """How the process ended, in words."""
        return how_it_ended(self.exit_code) + (f", {self.summary}" if self.summary and self.exit_code >= 0 else "")


def how_it_ended(exit_code: int) -> str:
    """An exit code in words; a negative one is that of a signal."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"killed by {name}"


def explain_failures(failures: Mapping[int, ProcessFailure], folder: Path) -> int:
    """Say on standard error which rank failed first and how the others ended; return the exit code of the first."""
    read = [_read(rank, failure, noticed) for noticed, (rank, failure) in enumerate(failures.items())]
    first, *others = sorted(read, key=lambda failure: failure.order)
    printed = any(folder.rglob("printed"))
    traceback = "" if printed or not first.traceback else first.traceback
    lines = [f"accelerator launch: rank {first.rank} failed first: {first.ending}"]
    if first.traceback and printed:
        lines[0] += " (traceback above)"
    elif first.exit_code == -signal.SIGKILL:
        lines[0] += ", which leaves no traceback; the system does this to a process when memory runs out"
    lines += [f"accelerator launch: rank {other.rank} followed: {other.ending}" for other in others]
    print(traceback + "\n".join(lines), file=sys.stderr, flush=True)
    return 128 - first.exit_code if first.exit_code < 0 else first.exit_code


def _read(rank: int, failure: ProcessFailure, noticed: int) -> Failure:
    message: Any = failure.message
    if not isinstance(message, dict):  # no error file: a signal, sys.exit, or a crash of the interpreter
        return Failure(rank, failure.exitcode, noticed, float(failure.timestamp + 1))
    extra = message["extraInfo"]
    follow_up = extra.get("follow_up", False)
    # A process that wrote of its own fault and was still on its way out when the agent ended the rest.
    on_its_way = failure.exitcode == -signal.SIGTERM and not follow_up
    return Failure(
        rank=rank,
        exit_code=1 if on_its_way else failure.exitcode,
        noticed=noticed,
        seconds=extra.get("timestamp_ns", failure.timestamp * 10**9) / 10**9,
        summary=message["message"].splitlines()[0][:200],
        traceback=extra["py_callstack"],
        follow_up=follow_up,
    )
