"""Worker processes kept alive for the whole test session, so that a distributed test costs milliseconds.

1. A fork server imports torch once (`multiprocessing`'s own; it has no threads, so forking from it is safe
   at any time, whatever the test process has started since).
2. Each rank is one process forked from it and used again by the next call; the test process talks to it
   through a pipe and hosts the store of the rendezvous, as torchrun's agent does.
3. A call sends a module-level function by reference. Test modules have no importable name, so the worker
   loads them from their path, with pytest's assertion rewriting.
4. After a call the worker leaves its process group and resets itself; one that died, hung or could not be
   reset is replaced.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import gc
import importlib.util
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _pytest.assertion.rewrite import rewrite_asserts

TESTS = Path(__file__).resolve().parent.parent
PRELOAD = ["rank_pool", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"]
LAUNCH_PREFIXES = ("ACCELERATOR_", "TORCHELASTIC_", "MASTER_", "SLURM_", "GROUP_", "ROLE_", "PMI_", "OMPI_")
LAUNCH_NAMES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
STACKS_SIGNAL = signal.SIGUSR2


class RemoteError(Exception):
    """What happened on a rank, where the exception itself could not be sent back; also the cause of one that could."""


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


def agent_store() -> dist.TCPStore:
    """A store for one rendezvous, hosted by this process on a port that the system chose; see its `.port`."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


# --- what passes through the pipe ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One rank's share of a call: the pickled function and arguments, and the surroundings to run them in."""

    payload: bytes
    modules: dict[str, str]  # test modules of the parent: name -> path
    filters: list[Any]  # the parent's warning filters
    environment: dict[str, str]
    output: str  # file for stdout and stderr
    seconds: int  # the worker ends itself after this long, should nobody be left to do it


@dataclass(frozen=True)
class Outcome:
    """What came of a call on one rank. Exactly one of `value` and `error` is set."""

    value: bytes | None = None
    error: bytes | None = None
    text: str = ""
    at: float = 0.0  # time.monotonic(), comparable between processes of one machine
    reusable: bool = True


# --- in the worker ------------------------------------------------------------------------------------------


def serve(pipe: connection.Connection) -> None:
    """Run calls until the other end of the pipe closes."""
    os.setsid()  # Ctrl-C is the parent's to handle, and a kill reaches the children of a worker as well
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True, chain=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    gc.freeze()  # torch's million objects need no visit after every call
    pipe.send_bytes(b"ready")
    while True:
        try:
            call = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        signal.alarm(call.seconds)
        outcome = _perform(call)
        signal.alarm(0)
        pipe.send_bytes(pickle.dumps(outcome))


def _perform(call: Call) -> Outcome:
    with _surroundings(call) as surroundings:
        try:
            function, args = _Unpickler(call).load()
            value = function(*args)
            outcome = Outcome(value=pickle.dumps(value), at=time.monotonic())
            del function, args, value
        except BaseException as error:
            outcome = _raised(error)
    if not surroundings["clean"]:
        outcome = Outcome(outcome.value, outcome.error, outcome.text, outcome.at, reusable=False)
    return outcome


def _raised(error: BaseException) -> Outcome:
    at, text = time.monotonic(), traceback.format_exc()
    # Frames keep models and process groups alive; a group must be left with neither.
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        pickled = pickle.dumps(RemoteError(text))
    return Outcome(error=pickled, text=text, at=at)


@contextlib.contextmanager
def _surroundings(call: Call) -> Iterator[dict[str, bool]]:
    """Everything a call may change, set before and put back after it."""
    state = {"clean": True}
    before = dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    os.environ.clear()
    os.environ.update(call.environment)
    _reset_torch()
    with open(call.output, "wb", buffering=0) as output, _redirected(output.fileno()), warnings.catch_warnings():
        warnings.filters[:] = call.filters  # type: ignore[index]
        warnings.simplefilter("default", _Unused, append=True)  # drops the cache of the filters
        yield state
        try:
            gc.collect()
            if dist.is_initialized():
                dist.destroy_process_group()
        except Exception:
            traceback.print_exc()
            state["clean"] = False
    os.environ.clear()
    os.environ.update(before[0])
    os.chdir(before[1])
    sys.path[:], sys.argv[:] = before[2], before[3]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _reset_torch()


class _Unused(Warning):
    """Raised by nobody."""


def _reset_torch() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    kept = os.dup(1), os.dup(2)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for original, number in zip(kept, (1, 2), strict=True):
            os.dup2(original, number)
            os.close(original)


class _Unpickler(pickle.Unpickler):
    """Finds classes and functions of test modules, which cannot be imported by name."""

    def __init__(self, call: Call) -> None:
        super().__init__(io.BytesIO(call.payload))
        self.modules = call.modules

    def find_class(self, module: str, name: str) -> Any:
        if module in self.modules and module not in sys.modules:
            load_test_module(module, self.modules[module])
        return super().find_class(module, name)


def load_test_module(name: str, path: str) -> None:
    """Import the test module at `path` as `name`, with pytest's assertion rewriting."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(_rewritten(path), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise


def _rewritten(path: str) -> CodeType:
    source = Path(path).read_bytes()
    tree = ast.parse(source, filename=path)
    rewrite_asserts(tree, source, path)
    return compile(tree, path, "exec", dont_inherit=True)


# --- in the test process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """One living rank: its process and our end of the pipe."""

    process: ForkServerProcess
    pipe: connection.Connection
    output: Path

    def kill(self) -> None:
        """End the process and its children, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)
        self.pipe.close()

    def stacks(self) -> str:
        """What the process has printed since its call began, and the Python stacks of all its threads."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, STACKS_SIGNAL)
            time.sleep(0.3)
        return self.printed()

    def printed(self) -> str:
        """What the process has printed since its call began."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class RankPool:
    """Calls functions on several ranks at once; see `__call__`."""

    grace_seconds = 10.0

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: dict[int, Worker] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))

    def warm(self) -> None:
        """Start importing torch in the fork server, in the background."""
        with _environment(without_launch_variables(os.environ)):
            forkserver.ensure_running()

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
        payload = _pickled(fn, args)
        workers = {rank: self._worker(rank) for rank in range(nproc)}
        store = agent_store()
        outcomes: dict[int, Outcome] = {}
        try:
            for rank, worker in workers.items():
                call = self._call(payload, worker, launch_variables(rank, nproc, store.port), env, timeout)
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
        return {rank: worker.process.pid or 0 for rank, worker in self._workers.items()}

    def close(self) -> None:
        """End all workers. May be called twice."""
        for worker in self._workers.values():
            worker.pipe.close()
        for worker in self._workers.values():
            worker.process.join(2)
            worker.kill()
        self._workers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _worker(self, rank: int) -> Worker:
        if rank in self._workers and not self._workers[rank].process.is_alive():
            self._replace([rank])
        if rank not in self._workers:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), name=f"rank{rank}")
            with _environment(without_launch_variables(os.environ)):
                process.start()
            theirs.close()
            self._workers[rank] = Worker(process, ours, self._folder / f"rank{rank}.txt")
            if not ours.poll(120):
                raise WorkerHung(f"the process of rank {rank} did not start within 120 s")
            ours.recv_bytes()
        return self._workers[rank]

    def _call(
        self,
        payload: bytes,
        worker: Worker,
        launch: dict[str, str],
        env: Mapping[str, str | None] | None,
        timeout: float,
    ) -> Call:
        asked = {**without_launch_variables(os.environ), **launch, **(env or {})}
        worker.output.unlink(missing_ok=True)
        return Call(
            payload=payload,
            modules=_test_modules(),
            filters=list(warnings.filters),
            environment={name: value for name, value in asked.items() if value is not None},
            output=str(worker.output),
            seconds=int(timeout + self.grace_seconds) + 30,
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

    def _replace(self, ranks: Any) -> None:
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
    found = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and TESTS in Path(path).parents and name not in ("rank_pool", "fresh_process"):
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
