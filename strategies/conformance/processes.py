"""Start the processes of the kit, run rules on all of them at once, and call a hang by its name.

The processes live for many rules and are replaced after one that failed, so that no rule suffers for another.
They are forked from `multiprocessing`'s fork server, which has imported torch and has neither threads nor a
device, so that replacing them costs little; where there is none, they are spawned. Each rule gets a rendezvous
of its own, hosted here, as torchrun's agent does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import re
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist

from .. import registry
from ..base import Strategy
from ..errors import ConformanceError, LaunchError
from .catalogue import find_rule, run_rule
from .rule import Broken, RuleNotRun

_START_SECONDS = 120.0
_GRACE_SECONDS = 5.0  # for the other ranks, once one has failed


@dataclass(frozen=True)
class Verdict:
    """What one rank says of a rule. `text` is the note, the reason or the message."""

    kind: Literal["ok", "not run", "broken", "raised", "died", "hung"]
    text: str
    at: float  # time.monotonic(), comparable between processes of one machine


@dataclass(frozen=True)
class _Task:
    """One rule to run, on one rank."""

    rule: str
    strategy: Strategy | str
    environment: dict[str, str]
    timeout_seconds: float
    stacks: str  # file for the stacks of a rank that hangs


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection[_Task, Verdict | str]


class Processes:
    """`num_processes` ranks on this machine that check strategies, rule by rule. A context manager.

    `timeout_seconds` is what one rule may take. The script that uses it needs the usual
    `if __name__ == "__main__":`, because new processes import it.
    """

    def __init__(self, num_processes: int, *, timeout_seconds: float = 60.0) -> None:
        if num_processes < 1:
            raise ValueError(f"num_processes is {num_processes}; expected an integer >= 1")
        self.num_processes = num_processes
        self.timeout_seconds = timeout_seconds
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. May be called twice."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(2)
        self._kill()
        self._folder.cleanup()

    def check(self, strategy: Strategy | str, rule: str) -> str | None:
        """Check a strategy by one rule, on all ranks. Returns a note on how it held, where there is one.

        `strategy` is an instance whose class can be imported, or a name as in a configuration, built with its
        defaults. Raises `ConformanceError` with the message of the rank that found it if the rule is broken or a
        rank hung or died, `RuleNotRun` if the rule needs more processes, `ConfigurationError` for unknown names,
        `LaunchError` if processes cannot be started.
        """
        if self.num_processes < find_rule(rule).min_processes:
            raise RuleNotRun(f"needs {find_rule(rule).min_processes} processes, and there is {self.num_processes}")
        if isinstance(strategy, str):
            registry.resolve(strategy)  # an unknown name is no fault of the rule
        self._start()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(self._workers):
            environment = _launch_variables(rank, self.num_processes, store.port)
            worker.pipe.send(_Task(rule, strategy, environment, self.timeout_seconds, self._stacks(rank)))
        verdicts = self._collect()
        kinds = {verdict.kind for verdict in verdicts}
        if kinds != {"ok"}:
            self._kill()
        if kinds <= {"ok", "not run"}:
            if "not run" in kinds:
                raise RuleNotRun(next(verdict.text for verdict in verdicts if verdict.kind == "not run"))
            return verdicts[0].text or None
        raise ConformanceError(_worst(verdicts, rule))

    def _start(self) -> None:
        if self._workers:
            return
        context = _context()
        for rank in range(self.num_processes):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(  # type: ignore[attr-defined]  # every context has it
                target=_serve, args=(theirs,), name=f"conformance-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        for rank, worker in enumerate(self._workers):
            try:
                if worker.pipe.poll(_START_SECONDS):
                    worker.pipe.recv()
                    continue
            except EOFError:
                pass
            self._kill()
            raise LaunchError(
                f"process {rank} of {self.num_processes} did not start. A script that runs the kit needs "
                '`if __name__ == "__main__":` around it, because new processes import the script.'
            )

    def _collect(self) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        # The ranks end themselves with their stacks after timeout_seconds; this is for those that cannot.
        deadline = time.monotonic() + self.timeout_seconds + _GRACE_SECONDS
        while len(verdicts) < self.num_processes and time.monotonic() < deadline:
            waiting = {rank: worker for rank, worker in enumerate(self._workers) if rank not in verdicts}
            connection.wait([worker.pipe for worker in waiting.values()], deadline - time.monotonic())
            for rank, worker in waiting.items():
                verdict = self._verdict(rank, worker)
                if verdict is not None:
                    verdicts[rank] = verdict
                    if verdict.kind not in ("ok", "not run"):
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return [
            verdicts.get(rank) or Verdict("hung", self._hung(rank), time.monotonic())
            for rank in range(self.num_processes)
        ]

    def _verdict(self, rank: int, worker: _Worker) -> Verdict | None:
        try:
            if not worker.pipe.poll():
                return None
            received = worker.pipe.recv()
            assert isinstance(received, Verdict)
            return received
        except (EOFError, OSError):
            worker.process.join(5)
        if Path(self._stacks(rank)).exists() and Path(self._stacks(rank)).stat().st_size:
            return Verdict("hung", self._hung(rank), time.monotonic())
        return Verdict("died", f"rank {rank} ended with exit code {worker.process.exitcode}", time.monotonic())

    def _hung(self, rank: int) -> str:
        where = _where(self._stacks(rank))
        return f"rank {rank} did not finish within {self.timeout_seconds:g} s{f', waiting in {where}' if where else ''}"

    def _stacks(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stacks-{rank}.txt")

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(10)
            worker.pipe.close()
        self._workers.clear()


def check(strategy: Strategy | str, rule: str, nproc: int, *, timeout_seconds: float = 60.0) -> str | None:
    """Check a strategy by one rule in `nproc` new processes; see `Processes.check`, which can keep them for more."""
    with Processes(nproc, timeout_seconds=timeout_seconds) as processes:
        return processes.check(strategy, rule)


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "strategies.conformance.processes"])
    return context


def _launch_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets for this rank of one node, with the agent's store at `port`."""
    numbers = {
        **{"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank},
        **{"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_WORLD_SIZE": 1, "ROLE_WORLD_SIZE": size},
        **{"MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0},
    }
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "conformance"}
    return {**texts, **{name: str(number) for name, number in numbers.items()}}


def _serve(pipe: connection.Connection[Verdict | str, _Task]) -> None:
    """The life of one rank: run rules until the other end of the pipe closes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("accelerator").setLevel(logging.ERROR)  # rules provoke what it warns of
    gc.freeze()  # torch's million objects need no visit after every rule
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            os.environ.update(task.environment)
            with open(task.stacks, "w") as stacks:
                # Ends the process: a rank that hangs in C++ cannot be interrupted.
                faulthandler.dump_traceback_later(task.timeout_seconds, exit=True, file=stacks)
                verdict = _judge(task)
                faulthandler.cancel_dump_traceback_later()
            pipe.send(verdict)


def _judge(task: _Task) -> Verdict:
    try:
        strategy = registry.resolve(task.strategy)() if isinstance(task.strategy, str) else task.strategy
        note = run_rule(task.rule, strategy)
        return Verdict("ok", note or "", time.monotonic())
    except RuleNotRun as reason:
        return Verdict("not run", str(reason), time.monotonic())
    except ConformanceError as error:
        if isinstance(error.__cause__, Broken):
            return Verdict("broken", str(error), time.monotonic())
        frames = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ is not None else ""
        return Verdict("raised", f"{error}\n{frames}".rstrip(), time.monotonic())
    except BaseException as error:
        return Verdict("raised", f"{type(error).__name__}: {error}", time.monotonic())


def _worst(verdicts: list[Verdict], rule: str) -> str:
    """The message that tells most: a broken rule, a death, an exception, a hang; then the earliest."""
    order = ("broken", "died", "raised", "hung")  # what the other ranks raise follows from a death
    bad = [verdict for verdict in verdicts if verdict.kind in order]
    worst = min(bad, key=lambda verdict: (order.index(verdict.kind), verdict.at))
    if worst.kind in ("broken", "raised"):
        return worst.text
    told = "; ".join(verdict.text for verdict in bad if verdict.kind in ("died", "hung"))
    return (
        f"the rule {rule} did not end: {told}. Expected: every rank to finish. All ranks must run the same collectives "
        "in the same order, whatever their data."
    )


def _where(stacks: str) -> str:
    """The innermost frames of the thread that ran the rule, from what `faulthandler` wrote."""
    text = Path(stacks).read_text(errors="replace") if os.path.exists(stacks) else ""
    for thread in text.split("\n\n"):
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread)
        if any(os.path.dirname(__file__) in file for file, _, _ in frames):
            torch_folder = os.path.dirname(torch.__file__)
            authors = [f"{function} ({file}:{line})" for file, line, function in frames if torch_folder not in file]
            inside = [frames[0][2]] if torch_folder in frames[0][0] else []
            return ", called by ".join([*inside, *authors[:2]])
    return ""
