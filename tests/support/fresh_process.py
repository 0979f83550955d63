"""Scripts in processes of their own, for what cannot be undone: exit codes, signals, kills, clean interpreters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rank_pool import TESTS, agent_store, launch_variables, without_launch_variables
from torch_version import without_gloo_lines
from warm_process import WarmProcess


@dataclass(frozen=True)
class Finished:
    """One process that ended. `returncode` is minus the signal's number if one killed it."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Job:
    """Processes running one script, one per rank."""

    def __init__(
        self, commands: Sequence[tuple[list[str], dict[str, str]]], cwd: Path, store: dist.TCPStore, warm: bool
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fresh-", dir=cwd))
        self._store = store  # lives as long as the job: ranks meet there
        self._start = time.monotonic()
        start = self._fork if warm else self._popen
        self.processes = [start(rank, *command, cwd) for rank, command in enumerate(commands)]

    def _fork(self, rank: int, argv: list[str], env: dict[str, str], cwd: Path) -> WarmProcess:
        return WarmProcess(argv[1:], env, cwd, self._file(rank, "out"), self._file(rank, "err"))

    def _popen(self, rank: int, argv: list[str], env: dict[str, str], cwd: Path) -> subprocess.Popen[bytes]:
        with open(self._file(rank, "out"), "wb") as out, open(self._file(rank, "err"), "wb") as err:
            return subprocess.Popen(
                argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def _file(self, rank: int, stream: str) -> Path:
        return self.folder / f"{rank}.{stream}"

    def _read(self, rank: int, stream: str) -> str:
        path = self._file(rank, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    def stdout(self, rank: int = 0) -> str:
        """What this rank has printed so far."""
        return without_gloo_lines(self._read(rank, "out"))

    def stderr(self, rank: int = 0) -> str:
        """What this rank has written to standard error so far."""
        return self._read(rank, "err")

    def send_signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to the process of one rank, and not to its children."""
        self.processes[rank].send_signal(number)

    def wait_for(self, text: str, rank: int = 0, timeout: float = 60.0) -> None:
        """Block until this rank has printed `text`. Raises `TimeoutError`, also if it ended without."""
        deadline = time.monotonic() + timeout
        while text not in self.stdout(rank):
            ended = self.processes[rank].poll() is not None and text not in self.stdout(rank)
            if ended or time.monotonic() > deadline:
                how = "ended" if ended else f"ran {timeout} s"
                raise TimeoutError(f"rank {rank} {how} without printing {text!r}\n{self._report()}")
            time.sleep(0.02)

    def wait(self, timeout: float = 60.0) -> list[Finished]:
        """Block until all ranks have ended. Raises `TimeoutError` with their output and stacks, and kills them."""
        deadline = self._start + timeout
        finished = {}
        try:
            for rank, process in enumerate(self.processes):
                process.wait(max(0.01, deadline - time.monotonic()))
                finished[rank] = time.monotonic() - self._start
        except subprocess.TimeoutExpired:
            running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            for rank in running:
                self.send_signal(signal.SIGABRT, rank)  # PYTHONFAULTHANDLER prints the stacks
            time.sleep(0.5)
            self.kill()
            raise TimeoutError(f"ranks {running} still ran after {timeout} s\n{self._report()}") from None
        return [
            Finished(process.returncode, self.stdout(rank), self.stderr(rank), finished[rank])
            for rank, process in enumerate(self.processes)
        ]

    def kill(self) -> None:
        """End every process that still runs, with its children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait(10)

    def _report(self) -> str:
        return "\n".join(
            f"--- rank {rank}: stdout\n{self.stdout(rank)}\n--- rank {rank}: stderr\n{self.stderr(rank)}"
            for rank in range(len(self.processes))
        )


class FreshProcesses:
    """Starts scripts; see `start` and `__call__`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []

    def start(
        self,
        script: str | Path | Sequence[str],
        *args: str,
        nproc: int | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        warm: bool = False,
    ) -> Job:
        """Start a script and return at once.

        `script` is a path, or the text of a script (anything with a newline in it), or a list of arguments
        for the interpreter such as `["-m", "accelerator.cli"]`. Without `nproc` it is one process with no
        launch variables; with it, that many ranks with what torchrun would set. `env` is added; `None`
        removes a variable. With `warm` they are forked from a process that has imported torch and this
        library, for a script whose imports are not what is looked at; see `warm_process`.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        argv = [sys.executable, *_interpreter_arguments(script, folder), *args]
        store = agent_store()
        commands = []
        for rank in range(nproc or 1):
            launch = launch_variables(rank, nproc, store.port) if nproc else {}
            commands.append((argv, _environment(launch, env)))
        job = Job(commands, cwd or folder, store, warm)
        self._jobs.append(job)
        return job

    def __call__(
        self,
        script: str | Path | Sequence[str],
        *args: str,
        nproc: int | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
        warm: bool = False,
    ) -> list[Finished]:
        """Run a script to its end and return what came of each rank; see `start`. Nothing is raised for its failure."""
        return self.start(script, *args, nproc=nproc, env=env, cwd=cwd, warm=warm).wait(timeout)

    def kill_leftovers(self) -> None:
        """End whatever a test has started and not waited for."""
        while self._jobs:
            self._jobs.pop().kill()


def _interpreter_arguments(script: str | Path | Sequence[str], folder: Path) -> list[str]:
    if isinstance(script, str) and "\n" in script:
        path = folder / "script.py"
        path.write_text(script)
        return [str(path)]
    if isinstance(script, (str, Path)):
        return [str(Path(script).resolve())]
    return list(script)


def _environment(launch: Mapping[str, str], env: Mapping[str, str | None] | None) -> dict[str, str]:
    asked: dict[str, str | None] = {
        **without_launch_variables(os.environ),
        "PYTHONPATH": str(TESTS.parent),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        **launch,
        **(env or {}),
    }
    return {name: value for name, value in asked.items() if value is not None}
