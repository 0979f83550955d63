"""Where the environment places a process, and what the others learn when a rank is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from accelerator import Accelerator
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import DDP, ConfigurationError, LaunchError, PeerLostError, World, collectives
from strategies.process_group import Placement, read_environment

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SLURM_STEP = SLURM_JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Placement()),
        (TORCHRUN, Placement(rank=5, size=8, local_rank=1, local_size=4, launcher="torchrun")),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            Placement(rank=1, size=2, local_rank=1, local_size=2, launcher="torchrun"),
        ),
        (SLURM_STEP, Placement(rank=6, size=8, local_rank=2, local_size=4, launcher="slurm")),
        (SLURM_STEP | TORCHRUN, Placement(rank=5, size=8, local_rank=1, local_size=4, launcher="torchrun")),
        (SLURM_JOB, Placement()),  # a batch script: one process, whatever the job may start
        (SLURM_JOB | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}, Placement()),  # interactive
    ],
)
def test_placement_from_the_environment(environ: dict[str, str], expected: Placement) -> None:
    assert read_environment(environ) == expected


@pytest.mark.parametrize(
    ("tasks", "node", "local", "expected"), [("3,1", 0, 2, 3), ("3,1", 1, 0, 1), ("2(x3),4", 3, 3, 4), ("8", 0, 7, 8)]
)
def test_processes_on_a_slurm_node(tasks: str, node: int, local: int, expected: int) -> None:
    step = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    assert read_environment(SLURM_STEP | step).local_size == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; expected an integer"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''; expected an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'; expected an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (SLURM_STEP | {"SLURM_LOCALID": "4"}, "local rank 4 of 4"),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE is 'many'"),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE is ''"),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'; expected an integer"),
    ],
)
def test_broken_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        read_environment(environ)


def test_a_missing_address_is_named(ranks: RankPool) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        error = ranks(setup, nproc=1, env={name: None}, return_exceptions=True)[0]
        assert isinstance(error, LaunchError)
        assert f"{name} is not" in str(error)


def setup() -> World:
    return DDP(device="cpu").setup()


def test_ranks_know_their_places(ranks: RankPool) -> None:
    worlds = ranks(setup, nproc=3)
    assert [(world.rank, world.local_rank, world.size, world.local_size) for world in worlds] == [
        (rank, rank, 3, 3) for rank in range(3)
    ]


def hooks_of_two_groups() -> list[str]:
    sys.excepthook = sys.__excepthook__
    found = []
    for _ in range(2):
        strategy = DDP(device="cpu")
        world = strategy.setup()
        found.append(sys.excepthook)
        strategy.teardown(world)
    sys.excepthook = sys.__excepthook__
    assert found[0] is found[1]
    return [hook.__name__ for hook in found]


def test_a_second_group_does_not_prefix_tracebacks_once_more(ranks: RankPool) -> None:
    assert ranks(hooks_of_two_groups) == [["_distributed_excepthook"] * 2] * 2


def test_slurm_places_ranks(ranks: RankPool) -> None:
    worlds = ranks(setup_under_slurm, free_port())
    assert [(world.rank, world.size, world.local_size) for world in worlds] == [(0, 2, 2), (1, 2, 2)]


def setup_under_slurm(port: int) -> World:
    rank = os.environ.pop("RANK")
    del os.environ["WORLD_SIZE"]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    os.environ.update(step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": str(port)})
    return setup()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_a_group_joined_before_is_found_and_left_alone(ranks: RankPool) -> None:
    assert ranks(join_twice) == [True] * 2


def join_twice() -> bool:
    strategy = DDP(device="cpu")
    first, second = strategy.setup(), strategy.setup()
    strategy.teardown(second)
    still_there = dist.is_initialized()
    strategy.teardown(first)
    return still_there and not dist.is_initialized()


LOST = """
import os, signal, sys, time
import torch
from accelerator import Accelerator
accelerator = Accelerator(strategy="ddp")
accelerator.wait_for_everyone()
if accelerator.process_index == int(sys.argv[1]):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    accelerator.gather(torch.ones(3))
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(7)
"""


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_killed_in_a_collective_is_named_within_seconds(fresh: FreshProcesses, lost: int) -> None:
    own_store = {"TORCHELASTIC_USE_AGENT_STORE": None, "MASTER_PORT": str(free_port())}  # rank 0's, not an agent's
    finished = fresh(LOST, str(lost), nproc=2, env=own_store, warm=True)
    assert finished[lost].returncode == -signal.SIGKILL
    waiting = finished[1 - lost]
    assert waiting.returncode == 7
    assert waiting.seconds - finished[lost].seconds < 6
    assert waiting.stdout.startswith(f"PeerLostError: rank {1 - lost}")
    assert f"rank {lost}" in waiting.stdout.partition(":")[2].partition(":")[2]


def go_or_gather(fate: str, lost: int) -> float:
    accelerator = Accelerator(strategy="ddp")
    accelerator.wait_for_everyone()
    if accelerator.process_index == lost:
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "leaves":
            accelerator.end_training()
            time.sleep(5)
        if fate == "ends":
            os._exit(0)
        raise ValueError("in the user's own code")
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=f"cannot end: rank {lost} left"):
        accelerator.gather(torch.ones(3))
    return time.monotonic() - start


@pytest.mark.parametrize(("fate", "nproc"), [("leaves", 2), ("ends", 2), ("raises", 2), ("dies", 3)])
def test_a_rank_that_is_gone_is_named_and_no_other(ranks: RankPool, fate: str, nproc: int) -> None:
    results = ranks(go_or_gather, fate, 1, nproc=nproc, return_exceptions=True)
    for seconds in results[:1] + results[2:]:
        assert isinstance(seconds, float), seconds
        assert seconds < 6


class Breaking(Dataset[Tensor]):
    """Samples, the read of one of which ends its rank."""

    def __init__(self, fate: str, broken: int) -> None:
        self.fate, self.broken = fate, broken

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        if index == self.broken:
            if self.fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a broken sample")
        return torch.full((3,), index / 24)


def train_until_lost(strategy: str, precision: Any, fate: str, broken: int) -> str:
    """Rank 1 goes while it reads a sample, or between backward and step where none is broken."""
    accelerator = Accelerator(strategy, mixed_precision=precision)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Breaking(fate, broken), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def loop() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).mean())
                if broken < 0 and accelerator.process_index:
                    os.kill(os.getpid(), signal.SIGKILL)
                optimizer.step()
                optimizer.zero_grad()

    if accelerator.process_index:
        loop()
    with pytest.raises(PeerLostError) as raised:
        loop()
    return str(raised.value)


@pytest.mark.parametrize(
    ("strategy", "precision", "fate", "broken"),
    [
        ("ddp", "no", "dies", 6),  # DDP rebuilds its buckets in the second forward
        ("ddp", "no", "raises", 6),
        ("fsdp", "no", "dies", 18),  # gathers parameters in forward
        ("ddp", "fp16", "dies", -1),  # agrees on overflow
    ],
)
def test_a_rank_lost_anywhere_in_the_step_is_named(
    ranks: RankPool, strategy: str, precision: str, fate: str, broken: int
) -> None:
    message, _ = ranks(train_until_lost, strategy, precision, fate, broken, return_exceptions=True)
    assert isinstance(message, str), message
    assert "rank 1 left" in message
    if fate == "raises":
        assert "it had raised reading batch 1 of epoch 0, samples [6, 7]: ValueError: a broken sample" in message


class LeavesWhenMoved(nn.Linear):
    """On rank 1 the process ends while it is prepared, when all ranks have said that they do so."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if dist.get_rank() == 1:
            os._exit(1)
        return super()._apply(fn, recurse)


def lose_a_rank_in(strategy: str, phase: str) -> str:
    accelerator = Accelerator(strategy)
    model: Any = LeavesWhenMoved(3, 1) if phase == "prepare" else nn.Linear(3, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        use_until_lost(accelerator, phase, model, optimizer)
    except PeerLostError as error:
        return str(error)
    return "nobody was missed"


def use_until_lost(accelerator: Accelerator, phase: str, model: Any, optimizer: Any) -> None:
    """Rank 1 ends where the next exchange is the one of `phase`."""
    leaves = accelerator.process_index == 1
    model, optimizer = accelerator.prepare(model, optimizer)
    if phase == "get_state_dict":
        if leaves:
            collectives.meet("get_state_dict", accelerator._world)
            os._exit(1)
        accelerator.get_state_dict(model)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 3)).mean())
        if leaves:
            accelerator._accumulation.finish(model.parameters())
            os._exit(1)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize(
    ("strategy", "phase"), [("fsdp", "clip"), ("fsdp", "get_state_dict"), ("fsdp", "prepare"), ("ddp", "prepare")]
)
def test_a_rank_lost_around_the_step_is_named(ranks: RankPool, strategy: str, phase: str) -> None:
    message, _ = ranks(lose_a_rank_in, strategy, phase, return_exceptions=True)
    assert isinstance(message, str), message
    assert "rank 1 left or did not answer" in message


DATASET = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from accelerator import Accelerator
class Numbers(Dataset):
    def __len__(self): return 16
    def __getitem__(self, index):
        if index == 9: raise ValueError("sample 9 is broken")
        return torch.tensor([float(index)])
if __name__ == "__main__":
    accelerator = Accelerator(strategy="ddp")
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(Numbers(), batch_size=2, num_workers=int(sys.argv[1]))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    try:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).mean())
                optimizer.step()
                optimizer.zero_grad()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(3)
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_the_dataset_of_one_rank_is_told_to_the_others(fresh: FreshProcesses, num_workers: int) -> None:
    failing, waiting = fresh(DATASET, str(num_workers), nproc=2, warm=True)  # sample 9 is in rank 0's third batch
    assert failing.stdout.startswith("ValueError: ")
    assert "sample 9 is broken" in failing.stdout
    assert waiting.stdout.startswith(
        "PeerLostError: rank 1 waited in a collective that cannot end: rank 0 left, it had raised "
    )
    assert "ValueError" in waiting.stdout
    assert "sample 9 is broken" in waiting.stdout
    assert waiting.seconds - failing.seconds < 6
    assert (failing.returncode, waiting.returncode) == (3, 3)


@pytest.mark.parametrize("backend", ["glooo", "cpu:glooo", "mpi", ""])
def test_a_backend_that_is_not_there_is_named(backend: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"backend is '{backend}'; expected one of .*gloo"):
        DDP(device="cpu", backend=backend).setup()
