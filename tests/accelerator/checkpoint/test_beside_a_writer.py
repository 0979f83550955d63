"""Another process loads, as an evaluation does, while a training writes to the same folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from fresh_process import FreshProcesses
from strategies import CPU

# A checkpoint is written over an older one of its name, and something happens between the two renames of that.
REPLACES = """
import os, signal, sys, time
from pathlib import Path

import torch
from accelerator import Accelerator

then, place, go = sys.argv[1], Path(sys.argv[2]), Path("go")
accelerator = Accelerator("cpu", project_dir=place.parents[1])
model = accelerator.prepare(torch.nn.Linear(4, 3))
accelerator.save_state(place)


def between(event, arguments):
    if event == "os.rename" and Path(arguments[1]) == place.absolute():
        print("between", flush=True)
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while not go.exists():
            time.sleep(0.01)


sys.addaudithook(between)
accelerator.save_state(place)
print("saved", flush=True)
"""


def reader(folder: Path) -> Accelerator:
    accelerator = Accelerator(CPU(), project_dir=folder)
    accelerator.prepare(nn.Linear(4, 3))
    return accelerator


def test_reading_between_the_two_renames_of_a_writer_disturbs_neither(fresh: FreshProcesses, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step-000000000"
    writer = fresh.start(REPLACES, "wait", str(place), cwd=tmp_path)
    writer.wait_for("between")
    evaluation = reader(tmp_path)
    threading.Timer(0.3, (tmp_path / "go").touch).start()
    assert evaluation.resume() == place
    (finished,) = writer.wait()
    assert finished.returncode == 0, finished.stderr
    assert "saved" in finished.stdout


@pytest.mark.parametrize("name", ["step-000000000", "last"])
def test_a_kill_between_the_two_renames_leaves_the_older_one(fresh: FreshProcesses, tmp_path: Path, name: str) -> None:
    place = tmp_path / "checkpoints" / name
    (finished,) = fresh(REPLACES, "kill", str(place), cwd=tmp_path)
    assert finished.returncode == -signal.SIGKILL
    assert not place.exists()
    assert reader(tmp_path).load_state(place) == place
    assert [path.name for path in place.parent.iterdir()] == [name]


class Number:
    """A registered object, which calls something in the middle of a load."""

    def __init__(self, value: float, call: Callable[[], object] = lambda: None) -> None:
        self.value, self.call = value, call

    def state_dict(self) -> dict[str, float]:
        self.call()
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def with_a_number(folder: Path, number: Number) -> tuple[Accelerator, nn.Linear]:
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = nn.Linear(4, 3)
    accelerator.prepare(net)
    accelerator.register_for_checkpointing(number)
    return accelerator, net


@pytest.mark.parametrize("keep_last", [None, 1])
def test_what_is_loaded_is_one_checkpoint(tmp_path: Path, keep_last: int | None) -> None:
    number = Number(0.0)
    training, net = with_a_number(tmp_path, number)

    def save() -> Path:
        """Over the one before, or beside it; that is then deleted, unless it is the oldest."""
        number.value += 1
        with torch.no_grad():
            net.weight.fill_(number.value)
        name = "last" if keep_last is None else f"step-{int(number.value):09d}"
        return training.save_state(tmp_path / "checkpoints" / name, keep_last=keep_last)

    save()
    second = save()
    read = Number(0.0, save)
    evaluation, copy = with_a_number(tmp_path, read)
    evaluation.load_state(second)
    assert number.value > 2
    assert read.value == 2
    assert bool((copy.weight == 2).all())
    last = save()
    left = {path for path in tmp_path.glob("checkpoints/*") if not path.name.startswith(".lock")}
    assert left == {last, last if keep_last is None else last.with_name("step-000000001")}


# Saves again and again and keeps one; what is read is gone a moment later.
KEEPS_ONE = """
import sys

import torch
from accelerator import Accelerator

accelerator = Accelerator("cpu", project_dir=sys.argv[1])
net = torch.nn.Linear(4, 3)
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
for step in range(150):
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    accelerator.save_state(keep_last=1, healthy_after=1)
    if step == 0:
        print("begun", flush=True)
"""


def test_reading_what_a_writer_deletes_goes_on_to_what_it_has_written_since(
    fresh: FreshProcesses, tmp_path: Path
) -> None:
    writer = fresh.start(KEEPS_ONE, str(tmp_path))
    writer.wait_for("begun")
    evaluation = Accelerator(CPU(), project_dir=tmp_path)
    net = nn.Linear(4, 3)
    evaluation.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    found = []
    while writer.processes[0].poll() is None:
        found.append(evaluation.resume())
    assert len(set(found)) > 3
    assert writer.wait()[0].returncode == 0, writer.stderr()
