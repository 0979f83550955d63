"""Worker processes kept alive for the whole test session, so that a distributed test costs milliseconds.

1. A fork server imports torch once (`multiprocessing`'s own; it has no threads, so forking from it is safe
   at any time, whatever the test process has started since).
2. Each rank is one process forked from it and used again by the next call (`rank_worker`); the test process
   talks to it through a pipe and hosts the store of the rendezvous, as torchrun's agent does.
3. A worker that died, hung or could not be reset is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rank_worker import STACKS_SIGNAL, Call, Outcome, RemoteError, serve

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
PRELOAD = [
    "rank_worker",
    "warm_process",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.launcher.api",
    "torch._dynamo",
    "accelerator",
    "accelerator.cli",
    "hypothesis.strategies",
    "pytest",
]
LAUNCH_PREFIXES = ("ACCELERATOR_", "TORCHELASTIC_", "MASTER_", "SLURM_", "GROUP_", "ROLE_", "PMI_", "OMPI_")
LAUNCH_NAMES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


class WorkerDied(RemoteError):
    """The process of a rank ended before its function returned."""


class WorkerHung(RemoteError):
    """A rank did not finish in time and was killed; the message holds its Python stacks."""


def without_launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` less everything that a launcher sets or that configures this library."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(LAUNCH_PREFIXES) and name not in LAUNCH_NAMES
    }


def launch_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for this rank of one node, with the agent's store at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def warm_context() -> ForkServerContext:
    """What forks processes from one that has torch, and begins to import it where that has not begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    with _environment({**without_launch_variables(os.environ), "PYTHONPATH": path}):  # Python 3.11 hands on no path
        forkserver.ensure_running()
    return context


def agent_store() -> dist.TCPStore:
    """A store for one rendezvous, hosted by this process on a port that the system chose; see its `.port`."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@dataclass(frozen=True)
class Worker:
    """One living rank: its process and our ends of the pipe and of its lifeline."""

    process: ForkServerProcess
    pipe: connection.Connection
    lifeline: connection.Connection
    output: Path

    @property
    def pid(self) -> int:
        """Of the process, which is started before there is a `Worker`, and leads a process group of its own."""
        assert self.process.pid
        return self.process.pid

    def kill(self) -> None:
        """End the process and its children, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)
        self.pipe.close()
        self.lifeline.close()

    def stacks(self) -> str:
        """What the process has printed since its call began, and the Python stacks of all its threads."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS_SIGNAL)
            time.sleep(0.3)
        return self.printed()

    def printed(self) -> str:
        """What the process has printed since its call began."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class RankPool:
    """Calls functions on several ranks at once; see `__call__`."""

    grace_seconds = 10.0

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))

    def warm(self) -> None:
        """Start importing torch in the fork server, in the background."""
        warm_context()

    def __call__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        nproc: int = 2,
        timeout: float = 60.0,
        env: Mapping[str, str | None] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Run `fn(*args)` on ranks 0 to `nproc - 1` at once and return their results in rank order.

        `fn` is a module-level function; arguments and results are pickled, tensors by value. Each rank finds
        what torchrun would set in its environment, updated with `env` (`None` removes a variable), generators
        seeded with 0, one thread, and the warning filters of the caller. What ranks print is printed here.

        The first exception of a rank is raised here, as the type it was, with the tracebacks of all ranks as
        its cause. Ranks that still run 10 s after another failed are killed. Raises `WorkerDied` if a process
        ended, `WorkerHung` if none failed but some still run after `timeout` seconds. With
        `return_exceptions`, exceptions stand in the list instead.
        """
        payload, modules = _pickled(fn, args), _test_modules()
        workers = {rank: self._worker(rank) for rank in range(nproc)}
        store = agent_store()
        outcomes: dict[int, Outcome] = {}
        try:
            for rank, worker in workers.items():
                call = self._call(payload, modules, worker, launch_variables(rank, nproc, store.port), env)
                worker.pipe.send_bytes(pickle.dumps(call))
            self._collect(workers, outcomes, timeout)
        finally:
            self._replace(rank for rank in workers if rank not in outcomes or not outcomes[rank].reusable)
        for rank, worker in workers.items():
            if text := worker.printed():
                print(f"--- printed by rank {rank} ---\n{text}")
        return _results(outcomes, return_exceptions)

    def pids(self) -> dict[int, int]:
        """Process id of each rank that lives."""
        return {rank: worker.pid for rank, worker in self._workers.items()}

    def close(self) -> None:
        """End all workers. May be called twice."""
        for worker in self._workers.values():
            worker.pipe.close()
            worker.lifeline.close()
        for worker in self._workers.values():
            worker.process.join(2)
            worker.kill()
        self._workers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _worker(self, rank: int) -> Worker:
        if rank in self._workers and not self._workers[rank].process.is_alive():
            self._replace([rank])
        if rank not in self._workers:
            context = warm_context()
            ours, theirs = context.Pipe()
            their_lifeline, lifeline = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, their_lifeline), name=f"rank{rank}")
            process.start()
            theirs.close()
            their_lifeline.close()
            self._workers[rank] = Worker(process, ours, lifeline, self._folder / f"rank{rank}.txt")
            if not ours.poll(120):
                raise WorkerHung(f"the process of rank {rank} did not start within 120 s")
            ours.recv_bytes()
        return self._workers[rank]

    def _call(
        self,
        payload: bytes,
        modules: dict[str, str],
        worker: Worker,
        launch: dict[str, str],
        env: Mapping[str, str | None] | None,
    ) -> Call:
        asked = {**without_launch_variables(os.environ), **launch, **(env or {})}
        worker.output.unlink(missing_ok=True)
        return Call(
            payload=payload,
            modules=modules,
            filters=list(warnings.filters),
            environment={name: value for name, value in asked.items() if value is not None},
            output=str(worker.output),
        )

    def _collect(self, workers: Mapping[int, Worker], outcomes: dict[int, Outcome], timeout: float) -> None:
        start = time.monotonic()
        deadline = start + timeout
        while pending := {rank: worker for rank, worker in workers.items() if rank not in outcomes}:
            watched = [end for worker in pending.values() for end in (worker.pipe, worker.process.sentinel)]
            if not connection.wait(watched, max(0.0, deadline - time.monotonic())):
                break
            for rank, worker in pending.items():
                outcome = _arrived(rank, worker)
                if outcome is None:
                    continue
                outcomes[rank] = outcome
                if outcome.error is not None:
                    deadline = min(deadline, time.monotonic() + self.grace_seconds)
        for rank, worker in pending.items():
            seconds = time.monotonic() - start
            text = f"rank {rank} still ran after {seconds:.1f} s and was killed. It had printed:\n{worker.stacks()}"
            outcomes[rank] = _failure(WorkerHung(text), at=float("inf"))

    def _replace(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            if rank in self._workers:
                self._workers.pop(rank).kill()


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{fn!r} and its arguments must be picklable to run on ranks: {error}. "
            "Use a function at module level and pass what it needs as arguments."
        ) from error


def _arrived(rank: int, worker: Worker) -> Outcome | None:
    try:
        if worker.pipe.poll():
            outcome = pickle.loads(worker.pipe.recv_bytes())
            assert isinstance(outcome, Outcome)
            return outcome
    except (EOFError, OSError):
        worker.process.join(5)
    if worker.process.exitcode is None:
        return None
    code = worker.process.exitcode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # Peers only see a closed connection and raise because of it: a death comes first.
    return _failure(WorkerDied(f"rank {rank} died: {how}. It had printed:\n{worker.printed()}"), at=float("-inf"))


def _failure(error: RemoteError, at: float) -> Outcome:
    return Outcome(error=pickle.dumps(error), text=str(error), at=at, reusable=False)


def _results(outcomes: Mapping[int, Outcome], return_exceptions: bool) -> list[Any]:
    failed = sorted((outcome.at, rank) for rank, outcome in outcomes.items() if outcome.error is not None)
    if failed and not return_exceptions:
        report = "\n".join(f"on rank {rank} of {len(outcomes)}:\n{outcomes[rank].text}" for _, rank in failed)
        raise _unpickled_error(outcomes[failed[0][1]]) from RemoteError("\n" + report)
    return [
        _unpickled_error(outcome) if outcome.value is None else pickle.loads(outcome.value)
        for _, outcome in sorted(outcomes.items())
    ]


def _unpickled_error(outcome: Outcome) -> BaseException:
    try:
        error = pickle.loads(outcome.error or b"")
    except Exception:
        error = RemoteError(outcome.text)
    assert isinstance(error, BaseException)
    if not isinstance(error, RemoteError):
        error.__cause__ = RemoteError("\n" + outcome.text)
    return error


def _test_modules() -> dict[str, str]:
    """Modules of this process that come from files of the test tree, and are not importable by name."""
    tests, support = f"{TESTS}{os.sep}", f"{SUPPORT}{os.sep}"
    found = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(tests) and not path.startswith(support):  # of text: thousands of modules, at every call
            found[name] = path
    return found


@contextlib.contextmanager
def _environment(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
