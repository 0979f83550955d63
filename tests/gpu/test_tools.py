"""On a GPU: the tools around the loop, where the device is what they look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from accelerator import Accelerator
from accelerator.debugging.flight import pending
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import DDP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its allocator, and NCCL")
TOO_MUCH = 1 << 50


def num_recorded() -> int:
    return sum(len(trace) for trace in torch.cuda.memory._snapshot()["device_traces"])


def test_out_of_memory_leaves_a_snapshot_and_recording_ends(tmp_path: Path) -> None:
    accelerator = Accelerator("single")
    with pytest.raises(torch.OutOfMemoryError), accelerator.profile(tmp_path):
        torch.empty(TOO_MUCH, device=accelerator.device)
    assert (tmp_path / "rank0-out-of-memory.pickle").stat().st_size > 0
    before = num_recorded()
    torch.cuda.empty_cache()
    torch.ones(1 << 24, device=accelerator.device)
    assert num_recorded() == before


def test_timers_keep_the_memory_of_the_device(tmp_path: Path) -> None:
    accelerator = Accelerator("single", project_dir=tmp_path)
    model = nn.Linear(1024, 1024)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(8, 1024, device=accelerator.device)).mean())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    lines = [json.loads(line) for line in (tmp_path / "timing" / "rank0.jsonl").read_text().splitlines()]
    memory = next(line["memory"] for line in lines if "memory" in line)
    assert memory["device_peak"] >= memory["device"] >= 1024 * 1024 * 4


def what_is_pending() -> tuple[str, str]:
    strategy = DDP(device="cuda")
    world = strategy.setup()
    values = torch.ones(3, device=world.device)
    dist.all_reduce(values)
    torch.cuda.synchronize()
    ended = pending()
    torch.cuda._sleep(10_000_000_000)  # seconds, before which the next one cannot end
    work = dist.all_reduce(values, async_op=True)
    found = pending()
    work.wait()
    torch.cuda.synchronize()
    strategy.teardown(world)
    return ended, found


def test_the_flight_recorder_knows_what_nccl_has_not_ended(ranks: RankPool) -> None:
    ((ended, found),) = ranks(what_is_pending, nproc=1, env={"TORCH_FR_BUFFER_SIZE": "100"})
    assert ended == ""
    assert found.startswith("all_reduce of (3,) Float")
    assert Path(__file__).name in found


def test_the_doctor_measures_nccl(fresh: FreshProcesses) -> None:
    (done,) = fresh(["-m", "accelerator", "doctor", "--nproc", "1", "--strategy", "ddp"], timeout=120)
    assert done.returncode == 0, done.stdout
    assert "training can start" in done.stdout
    assert "cuda" in done.stdout
