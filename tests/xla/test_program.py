"""What the compiler made of a sharded window, read from the program that it dumps."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fresh_process import FreshProcesses

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(600)
def test_a_sharded_window_gathers_parameters_and_reduces_gradients(fresh: FreshProcesses, tmp_path: Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    (finished,) = fresh(HERE / "parts.py", "fsdp", "sgd", env={"XLA_FLAGS": flags}, timeout=500)
    assert finished.returncode == 0, finished.stderr
    programs = [path.read_text() for path in tmp_path.glob("*SyncTensorsGraph*after_optimizations.txt")]
    window = max(programs, key=len)
    assert len(re.findall(r" all-gather\(", window)) >= 2  # the two weights that are cut
    assert len(re.findall(r" all-reduce\(", window)) >= 2
