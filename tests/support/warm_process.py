"""A process that has imported torch already: for scripts whose story is not how an interpreter starts.

Starting an interpreter costs a test its imports (torch, and with the first optimizer torch._dynamo: seconds of a core),
and forking one that has them costs milliseconds. The fork ends as Python ends: threads are joined, what was registered
with `atexit` is called, and the exit code is what it would have been.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from accelerator.launch.worker import run_script
from rank_pool import warm_context


class WarmProcess:
    """`python arguments`, with what a `Job` needs of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
        self._process = warm_context().Process(target=become, args=(list(arguments), dict(env), cwd, out, err))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `Popen.poll` returns it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one killed it; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Block until it has ended. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


def become(arguments: list[str], environment: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    """Run `python arguments` in this process, which ends with it."""
    os.setsid()
    gc.freeze()  # so that the end does not visit torch's million objects, each page of which would be copied
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    ctypes.pythonapi.Py_Exit(_exit_code(arguments))


def _exit_code(arguments: list[str]) -> int:
    """Run what is asked, and the code that Python would end with."""
    try:
        if arguments[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv[:] = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(arguments[0]).parent))
            sys.argv[:] = arguments
            run_script(arguments[0])
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0
