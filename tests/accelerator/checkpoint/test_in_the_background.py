"""Saving in the background holds what there was at the call, one at a time, and tells of its failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, StateError

# torch 2.9 warns of its own storages; a thread must not change the filters of warnings, which are those of all threads
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def train_on(strategy: Any, folder: str) -> bool:
    """Save in the background, train on at once, and go back: whether all is as it was at the call."""
    accelerator = Accelerator(strategy, project_dir=folder)
    net = nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 64))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))

    def step() -> float:
        loss = model(torch.ones(2, 64)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()
    same = []
    for _ in range(3):  # the second and third are staged in the memory of the first
        saved = accelerator.save_state(async_=True)
        after = [step() for _ in range(4)]
        accelerator.load_state(saved)
        same.append([step() for _ in range(4)] == after)
    accelerator.save_state(async_=True)
    accelerator.end_training()
    return all(same) and len(list((Path(folder) / "checkpoints").glob("step-*"))) == 4


@pytest.mark.parametrize(("strategy", "nproc"), [(CPU(), 1), (DDP(), 2), (FSDP(), 2)], ids=str)
def test_it_holds_what_there_was_at_the_call(ranks: RankPool, tmp_path: Path, strategy: Any, nproc: int) -> None:
    assert ranks(train_on, strategy, str(tmp_path), nproc=nproc) == [True] * nproc


def test_the_next_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    accelerator.prepare(nn.Linear(2000, 2000))
    for number in range(3):
        accelerator.save_state(tmp_path / str(number), async_=True)
        written = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
        assert {str(before) for before in range(number)} <= set(written)
        assert len(list(tmp_path.glob(".writing-*"))) <= 1
    accelerator.end_training()


def test_a_failure_is_raised_by_the_next_call_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    accelerator.prepare(nn.Linear(2, 2))
    accelerator.save_state(async_=True)
    with pytest.raises(StateError, match=r"the last save_state\(async_=True\) failed: .*checkpoints"):
        accelerator.save_state(async_=True)
    (tmp_path / "checkpoints").unlink()
    accelerator.save_state(async_=True)
    accelerator.load_state()


LEAVES = """
import sys, torch
from accelerator import Accelerator
accelerator = Accelerator("ddp", project_dir=sys.argv[1])
accelerator.prepare(torch.nn.Linear(2000, 2000))
accelerator.save_state(async_=True)
"""


def test_the_exit_waits_for_the_last(fresh: FreshProcesses, tmp_path: Path) -> None:
    for finished in fresh(LEAVES, str(tmp_path), nproc=2, warm=True):
        assert finished.returncode == 0, finished.stderr
    manifest = json.loads((tmp_path / "checkpoints" / "step-000000000" / "manifest.json").read_text())
    assert sum(entry["size"] for entry in manifest["files"].values()) > 2000 * 2000 * 4


FAILS = """
import atexit, sys, torch
from pathlib import Path
from accelerator import Accelerator

def main():
    accelerator = Accelerator("cpu", project_dir=sys.argv[1])
    atexit.register(print, "registered after")
    accelerator.prepare(torch.nn.Linear(2, 2))
    Path(sys.argv[1], "file").write_text("in the way")
    accelerator.save_state(Path(sys.argv[1], "file", "x"), async_=True)
    return accelerator

if sys.argv[2] == "let go":
    main()
elif sys.argv[2] == "exit":
    kept = main()
else:
    try:
        main().end_training()
    except RuntimeError as error:
        print("caught", error)
"""


@pytest.mark.parametrize(("how", "code"), [("let go", 1), ("exit", 1), ("caught", 0)])
def test_a_failure_that_nobody_sees_is_the_exit_code(
    fresh: FreshProcesses, tmp_path: Path, how: str, code: int
) -> None:
    (finished,) = fresh(FAILS, str(tmp_path), how, warm=how != "exit")
    assert finished.returncode == code, finished.stderr
    assert "the last save_state(async_=True) failed" in finished.stdout + finished.stderr
    assert "registered after" in finished.stdout
