"""The digits demo, started by `accelerator launch` under XLA, draws the curve that it draws on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fresh_process import FreshProcesses

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"


@pytest.mark.timeout(600)
def test_the_digits_demo_gives_the_curve_of_a_cpu(fresh: FreshProcesses, tmp_path: Path) -> None:
    curves = []
    for strategy in ("cpu", "xla"):
        command = ["-m", "accelerator", "launch", "--strategy", strategy, str(EXAMPLE)]
        path = tmp_path / f"{strategy}.json"
        (finished,) = fresh([*command, "--curve", str(path)], timeout=290, env={"XLA_FLAGS": None})
        assert finished.returncode == 0, finished.stderr
        curves.append(json.loads(path.read_text()))
    cpu, xla = curves
    assert len(xla["losses"]) == 230
    assert max(abs(one - other) for one, other in zip(cpu["losses"], xla["losses"], strict=True)) < 5e-6
    assert xla["accuracy"] == pytest.approx(cpu["accuracy"], abs=0.003)
