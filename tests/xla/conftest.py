"""Run a script of this folder in a process of its own: one process is in one mode of torch_xla from start to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fresh_process import FreshProcesses

HERE = Path(__file__).resolve().parent
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run(fresh: FreshProcesses) -> Run:
    """`run("parts.py", "data")` gives what the script prints as JSON in its last line. Each is run once."""
    done: dict[tuple[str, ...], Any] = {}

    def run_once(*command: str) -> Any:
        if command not in done:
            name, *arguments = command
            (finished,) = fresh(HERE / name, *arguments, timeout=500)
            assert finished.returncode == 0, finished.stderr
            done[command] = json.loads(finished.stdout.splitlines()[-1])
        return done[command]

    return run_once
