"""A run goes on under XLA from a checkpoint of a CPU, and the other way round, as if it had stayed where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(600)
def test_xla_and_cpu_go_on_from_each_other(run: Callable[..., Any], tmp_path: Path) -> None:
    whole = run("checkpoints.py", "cpu", str(tmp_path / "whole"), "6")
    for writer in ("cpu", "xla"):
        first = run("checkpoints.py", writer, str(tmp_path / writer), "3")
        assert first == pytest.approx(whole[:3], abs=1e-7)
        for reader in ("cpu", "xla"):
            copy = tmp_path / f"{writer} to {reader}"
            shutil.copytree(tmp_path / writer, copy)
            assert run("checkpoints.py", reader, str(copy), "3") == pytest.approx(whole[3:], abs=1e-7)
