"""The life of one worker process of the test harness: take a call, run it, put everything back, answer.

A call names a module-level function. Test modules have no importable name, so they are loaded from their
path, with pytest's assertion rewriting. After a call the worker leaves its process group and resets itself.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import fcntl
import gc
import importlib.util
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _pytest.assertion.rewrite import rewrite_asserts

STACKS_SIGNAL = signal.SIGUSR2


class RemoteError(Exception):
    """What happened on a rank, where the exception itself could not be sent back; also the cause of one that could."""


@dataclass(frozen=True)
class Call:
    """One rank's share of a call: the pickled function and arguments, and the surroundings to run them in."""

    payload: bytes
    modules: dict[str, str]  # test modules of the parent: name -> path
    filters: list[Any]  # the parent's warning filters
    environment: dict[str, str]
    output: str  # file for stdout and stderr


@dataclass(frozen=True)
class Outcome:
    """What came of a call on one rank. Exactly one of `value` and `error` is set."""

    value: bytes | None = None
    error: bytes | None = None
    text: str = ""
    at: float = 0.0  # time.monotonic(), comparable between processes of one machine
    reusable: bool = True


def serve(pipe: connection.Connection, lifeline: connection.Connection) -> None:
    """Run calls until the other end of the pipe closes. Nothing is ever sent through the lifeline."""
    os.setsid()  # Ctrl-C is the parent's to handle, and a kill reaches the children of a worker as well
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True, chain=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Torch's million objects need no visit after every call. Cycles are collected between calls only: one collection
    # in the middle of a call, beside torch's own threads, has ended a worker with SIGSEGV.
    gc.freeze()
    gc.disable()
    with contextlib.suppress(EOFError, OSError):  # the other end was closed, and that is all there is to do
        pipe.send_bytes(b"ready")
        while True:
            call = pickle.loads(pipe.recv_bytes())
            with _ended_with_the_parent(lifeline):
                outcome = _perform(call)
            pipe.send_bytes(pickle.dumps(outcome))


@contextlib.contextmanager
def _ended_with_the_parent(lifeline: connection.Connection) -> Iterator[None]:
    """Have SIGIO end this process, whatever it hangs in, when the other end of the lifeline closes.

    It is a pipe of its own: of one that carries calls, the kernel may signal the arrival of the last one late.
    """
    flags = fcntl.fcntl(lifeline.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(lifeline.fileno(), fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        yield
    finally:
        fcntl.fcntl(lifeline.fileno(), fcntl.F_SETFL, flags)


def _perform(call: Call) -> Outcome:
    with _surroundings(call) as surroundings:
        try:
            function, args = _Unpickler(call).load()
            value = function(*args)
            outcome = Outcome(value=pickle.dumps(value), at=time.monotonic())
            del function, args, value
            _leave(seconds=1.0)
        except BaseException as error:
            outcome = _raised(error)
            _leave(seconds=0.0)
    if not surroundings["clean"]:
        outcome = replace(outcome, reusable=False)
    return outcome


def _leave(seconds: float) -> None:
    """Say that this rank's function has ended, and wait a while for the others' that are in the group.

    One that needed no other rank may end while gloo still connects the rest, whose group fails then.
    """
    if not dist.is_initialized():
        return
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"ended/{dist.get_rank()}", "")
        everyone = [f"ended/{rank}" for rank in range(dist.get_world_size())]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not store.check(everyone):
            time.sleep(0.005)


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
                gc.collect()
            gc.freeze()  # what lives on are modules that the call has imported
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
    if torch.empty(0).device.type != "cpu":  # torch 2.9 does not find its default again once it was set, even to None
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
