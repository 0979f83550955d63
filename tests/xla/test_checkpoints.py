"""A run goes on under XLA from a checkpoint of any strategy, and the other way round, as if it had stayed there.

The checkpoints are written inside a window that is open.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fresh_process import FreshProcesses

SCRIPT = Path(__file__).with_name("checkpoints.py")
# A process drives one device or several. A backward on the CPU may come only after torch_xla has started: it is last.
ONE, MESHES, OTHERS = ("none",), ("data", "fsdp", "hybrid"), ("ddp", "fsdp2")
HERE = (*MESHES, "cpu")
ALL = (*ONE, *HERE, *OTHERS)
PAIRS = [(one, other) for one in ALL for other in ALL if {one, other} & {*ONE, *MESHES}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses of whole runs, of first parts that were saved, and of the rest under another strategy."""
    folder = tmp_path_factory.mktemp("checkpoints")
    processes = FreshProcesses(tmp_path_factory.mktemp("processes"))
    found: dict[str, Any] = {}
    writing = ((2, "write", OTHERS), (None, "write", ONE))
    reading = ((None, "write+read", HERE), (None, "read", ONE), (2, "read", OTHERS))
    for nproc, tasks, names in (*writing, *reading):
        finished = processes(SCRIPT, str(folder), tasks, *names, nproc=nproc, timeout=800)
        assert all(one.returncode == 0 for one in finished), finished[0].stderr
        found |= json.loads(finished[0].stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(2500)
@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_run_goes_on_from_a_checkpoint_of_any_strategy(runs: Any, writer: str, reader: str) -> None:
    (whole, _), (first, _), (rest, cut_alike) = runs[f"whole {reader}"], runs[writer], runs[f"{writer} to {reader}"]
    assert first + rest == pytest.approx(whole, abs=1e-6)
    if reader == writer:
        assert first + rest == whole
    assert cut_alike  # optimizer state as its parameters, before the first step


def test_random_numbers_go_on_inside_a_window_as_if_it_had_never_stopped(runs: Any) -> None:
    whole, parts = runs["dropping"]
    assert parts == whole
