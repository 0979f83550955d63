"""Starting processes from a notebook: the function travels to new interpreters, its output and its errors come back."""

from __future__ import annotations

import json
import linecache
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerator.config import FLAGS_VARIABLE, resolve_settings
from accelerator.config.layers import flag_of
from accelerator.config.settings import catalogue
from strategies.errors import LaunchError, nearest

PROCESSES = "accelerator.launch.notebook_processes"
SECONDS_TO_END = 40.0


def notebook_launcher(
    fn: Callable[..., Any], args: Sequence[Any] = (), num_processes: int | None = None, **settings: object
) -> list[Any]:
    """Run `fn(*args)` in new processes as `accelerator launch` would; return what each rank returned, in rank order.

    `fn` may be defined in the notebook. It is sent by value with the globals that it uses, so build the model, the data
    and the `Accelerator` inside it. `num_processes` is `nproc_per_node`; `settings` are the launcher's flags:
    `strategy="fsdp"`, `mixed_precision="bf16"`, `max_restarts=1`. What the processes print appears under the cell.

    Called from one process. Raises `LaunchError` or `ConfigurationError` before anything is started, if `fn` cannot be
    sent, a setting cannot be, or torch_xla holds the devices in this process already; and `LaunchError` with the
    tracebacks of all ranks if one failed. An interrupt of the cell ends the processes.
    """
    refuse_held_devices()
    flags = _flags({**settings, **({} if num_processes is None else {"nproc_per_node": num_processes})})
    call = _pickled(fn, args)
    words = [f"{flag_of(name)}={value}" for name, value in flags.items()]
    with tempfile.TemporaryDirectory(prefix="accelerator-notebook-") as folder:
        (Path(folder) / "call").write_bytes(call)
        code = _run([sys.executable, "-m", PROCESSES, "agent", folder, *words])
        if code == 0:
            return _results(Path(folder))
        raise LaunchError(_account(Path(folder), code))


def refuse_held_devices() -> None:
    """Raise `LaunchError` if this process holds devices that no other process can open meanwhile.

    A GPU can be opened by several; the runtime of torch_xla takes all devices of the host.
    """
    module = sys.modules.get("torch_xla")
    if module is not None and module._XLAC._xla_runtime_is_initialized():
        raise LaunchError(
            "torch_xla has started its runtime in this kernel, which holds the devices until it ends, so no process "
            "started from here could use them. Restart the kernel, and touch no XLA device before notebook_launcher: "
            "the Accelerator belongs inside the function."
        )


def _flags(settings: dict[str, object]) -> dict[str, str]:
    """The launcher's flags by dotted name, as text. Raises `ConfigurationError` for a value that cannot be."""
    names = {name.rpartition(".")[2]: name for name in (*catalogue(), "config")}
    for name in settings:
        if name not in names:
            raise LaunchError(
                f"{name} is not a setting of notebook_launcher; expected one of {', '.join(names)}."
                f"{nearest(name, names)}"
            )
    flags = {names[name]: _text(value) for name, value in settings.items()}
    resolve_settings({}, environ={**os.environ, FLAGS_VARIABLE: json.dumps(flags)}, directory=Path.cwd())
    return flags


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _pickled(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    try:
        import cloudpickle
    except ImportError as error:
        raise LaunchError(
            "notebook_launcher needs cloudpickle to send a function of a notebook to other processes. "
            "pip install 'torch-accelerator[notebook]'"
        ) from error
    if not callable(fn) or not isinstance(args, (tuple, list)):
        raise LaunchError(
            f"notebook_launcher got {type(fn).__name__} and args={args!r:.80}; expected a function and a tuple of its "
            "arguments: notebook_launcher(train, (config,), num_processes=2)."
        )
    # Cells have no file in which another process could look up the lines of a traceback.
    cells = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and not os.path.exists(name)}
    try:
        return bytes(cloudpickle.dumps({"fn": fn, "args": tuple(args), "path": sys.path, "cells": cells}))
    except Exception as error:  # whatever an object's own __reduce__ raises
        raise LaunchError(
            f"{getattr(fn, '__name__', 'fn')} cannot be sent to other processes, because something that it uses "
            f"cannot be pickled: {type(error).__name__}: {error}. Create it inside the function."
        ) from error


def _run(command: Sequence[str]) -> int:
    """Run the agent, show what it and its processes print, and return its exit code. Its input is its lifeline."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # an interrupt of the kernel comes to us alone, and we end the processes in order
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        process.stdout.close()
        if process.stdin is not None:
            process.stdin.close()


def _results(folder: Path) -> list[Any]:
    import cloudpickle

    files = sorted(folder.glob("result-*"), key=_rank_of)
    return [cloudpickle.loads(file.read_bytes()) for file in files]


def _rank_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _account(folder: Path, code: int) -> str:
    """The tracebacks of all ranks: first of those that failed by themselves, then of those that lost a peer."""
    own = sorted(folder.glob("error-*"), key=_rank_of)
    followed = sorted(folder.glob("follow-*"), key=_rank_of)
    ended = [path for path in sorted(folder.glob("ended-*"), key=_rank_of) if path.stat().st_size]
    parts = [f"rank {_rank_of(path)} failed:\n{path.read_text()}" for path in own]
    parts += [f"rank {_rank_of(path)} lost a peer:\n{path.read_text()}" for path in followed]
    parts += [f"rank {_rank_of(path)} was ended by the launcher here:\n{path.read_text()}" for path in ended]
    if not parts:
        parts = ["No process left a traceback; what they printed is above."]
    return f"the processes of notebook_launcher failed (exit code {code}).\n\n" + "\n".join(parts)
