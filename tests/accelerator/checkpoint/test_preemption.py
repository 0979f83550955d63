"""A job that is told to end saves on all ranks at one step, says so to its launcher, and goes on when started again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.checkpoint.preemption import Timetable
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, ConfigurationError, World

# torch 2.9 warns of its own storages; a thread must not change the filters of warnings, which are those of all threads
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def train(strategy: Any, folder: str, signals: dict[int, str]) -> tuple[int, int, bool]:
    """Until a checkpoint is due; `signals` are sent by ranks to themselves after three steps."""
    before = signal.getsignal(signal.SIGTERM)
    accelerator = Accelerator(strategy, project_dir=folder)
    net = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    code = 0
    for step in range(1, 2000):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        name = signals.get(accelerator.process_index)
        if step == 3 and name is not None:
            os.kill(os.getpid(), getattr(signal, name))
        if accelerator.checkpoint_due(every_steps=10**6):
            accelerator.save_state(async_=True)
            try:
                accelerator.exit_if_preempted()
            except SystemExit as leaving:
                code = int(str(leaving.code))
            break
    assert not accelerator.checkpoint_due()  # it was saved
    accelerator.end_training()
    return step, code, signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("strategy", "nproc", "signals"),
    [(CPU(), 1, {0: "SIGTERM"}), (DDP(), 2, {1: "SIGUSR1"}), (FSDP(), 2, {0: "SIGTERM", 1: "SIGUSR1"})],
    ids=str,
)
def test_a_signal_on_any_rank_makes_all_save_at_one_step(
    ranks: RankPool, tmp_path: Path, strategy: Any, nproc: int, signals: dict[int, str]
) -> None:
    results = ranks(train, strategy, str(tmp_path), signals, nproc=nproc)
    assert set(results) == {(results[0][0], 75, True)}
    assert (tmp_path / "checkpoints" / f"step-{results[0][0]:09d}" / "manifest.json").exists()


def test_steps_and_minutes() -> None:
    now = [0.0]
    timetable = Timetable(World(), clock=lambda: now[0])
    due = []
    for step in range(1, 13):
        now[0] += 30.0
        if timetable.due(step, every_steps=5, every_minutes=2.0):
            due.append(step)
            timetable.saved(step)
        assert not timetable.due(step, every_steps=5, every_minutes=None) or step not in due
    assert due == [4, 5, 9, 10]


def test_a_multiple_passed_between_two_calls_is_due_once() -> None:
    timetable = Timetable(World())
    assert [n for n in range(0, 60, 3) if timetable.due(n, every_steps=10, every_minutes=None)] == [12, 21, 30, 42, 51]
    timetable.loaded(45)
    assert [n for n in range(46, 60) if timetable.due(n, every_steps=10, every_minutes=None)] == [50]


def agree(size: int) -> list[bool]:
    """Rank 0's clock decides, and ranks talk only now and then."""
    accelerator = Accelerator(DDP())
    rank, now = accelerator.process_index, [0.0]
    timetable = Timetable(accelerator._world, clock=lambda: now[0])
    due = []
    for step in range(1, 31):
        now[0] += 0.1 * (1 + rank)
        due.append(timetable.due(step, every_steps=None, every_minutes=1 / 60))
        if due[-1]:
            timetable.saved(step)
    accelerator.end_training()
    return due


def test_ranks_agree_on_the_time(ranks: RankPool) -> None:
    first, second = ranks(agree, 2)
    assert first == second
    assert 2 <= sum(first) <= 3


def test_it_is_not_due_inside_a_window_and_bad_input(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), gradient_accumulation_steps=2, project_dir=tmp_path)
    net = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    due = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
        due.append(accelerator.checkpoint_due(every_steps=1))
    assert due == [False, True, False, True]
    with pytest.raises(ConfigurationError, match="every_steps is 0; expected a number above 0"):
        accelerator.checkpoint_due(every_steps=0)
    with pytest.raises(ConfigurationError, match="signals names 'TERM'; expected names such as"):
        accelerator.checkpoint_due(signals=["TERM"])
    accelerator.exit_if_preempted()
    accelerator.end_training()


def test_the_handler_of_the_script_is_called_and_put_back() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    try:
        own = signal.getsignal(signal.SIGUSR1)
        accelerator = Accelerator(CPU())
        accelerator.checkpoint_due(signals=["SIGUSR1"])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert accelerator.checkpoint_due(signals=["SIGUSR1"])
        assert called == [signal.SIGUSR1]
        accelerator.end_training()
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, before)


SCRIPT = """
import sys, torch
from pathlib import Path
from accelerator import Accelerator

accelerator = Accelerator(project_dir=sys.argv[1], seed=0, split_batches=True)
net = torch.nn.Linear(1, 1, bias=False)
data = torch.arange(1.0, 41.0).view(-1, 1)
loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-4), loader)
accelerator.resume()
seen = Path(sys.argv[1]) / "seen"
while loader.state_dict()["epoch"] < 1:
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        samples = accelerator.gather_for_metrics(x).flatten().tolist()
        if accelerator.is_main_process:
            with seen.open("a") as file:
                file.write(f"{samples}\\n")
        if sys.argv[2] == "wait" and int(loader.state_dict()["position"]) == 10:
            print("ready", flush=True)
            while not accelerator.checkpoint_due():
                pass
        if accelerator.checkpoint_due():
            accelerator.save_state()
            accelerator.exit_if_preempted()
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_launched_job_asks_to_be_requeued_and_goes_on_with_fewer_processes(
    fresh: FreshProcesses, tmp_path: Path, name: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "run").mkdir()
    launch = ["-m", "accelerator", "launch", "--nproc-per-node", "2", str(script)]
    job = fresh.start(launch, str(tmp_path / "run"), "wait", warm=True)
    job.wait_for("ready")
    job.send_signal(getattr(signal, name))
    (finished,) = job.wait(90)
    assert finished.returncode == 75, finished.stderr
    assert "failed" not in finished.stderr
    (finished,) = fresh(script, str(tmp_path / "run"), "go on", nproc=1, warm=True)
    assert finished.returncode == 0, finished.stderr
    seen = [json.loads(line) for line in (tmp_path / "run" / "seen").read_text().splitlines()]
    assert sorted(sample for samples in seen for sample in samples) == list(range(1, 41))


FORKS = """
import os, signal, time
from accelerator import Accelerator
accelerator = Accelerator("cpu")
accelerator.checkpoint_due()
ready, tell = os.pipe()
child = os.fork()
if not child:
    os.write(tell, b"1")
    while True:
        time.sleep(0.02)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_forked_from_it_is_ended_by_the_signal(fresh: FreshProcesses) -> None:
    (finished,) = fresh(FORKS, warm=True)
    assert finished.stdout.split() == [str(-signal.SIGTERM)], finished.stderr
