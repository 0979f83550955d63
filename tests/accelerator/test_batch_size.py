"""`find_executable_batch_size` tries smaller sizes, on all ranks alike, and lets other errors pass."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator, find_executable_batch_size
from blocks_net import losses_of, make_net
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import DDP, FSDP, ConfigurationError, StepError


def test_sizes_fall_until_memory_suffices() -> None:
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=100)
    def train(batch_size: int, factor: int) -> int:
        tried.append(batch_size)
        if batch_size > 80:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_size * factor

    assert train(2) == 144
    assert tried == [100, 90, 81, 72]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_memory_of_the_host_counts_too(error: Exception) -> None:
    def train(batch_size: int) -> int:
        if batch_size > 1:
            raise error
        return batch_size

    search = find_executable_batch_size(train, starting_batch_size=8, reduce_batch_size_fn=lambda size: size // 2)
    assert search() == 1


def test_other_errors_pass_and_sizes_end() -> None:
    def broken(batch_size: int) -> None:
        raise KeyError(batch_size)

    def hungry(batch_size: int) -> None:
        raise MemoryError

    with pytest.raises(KeyError, match="4"):
        find_executable_batch_size(broken, starting_batch_size=4)()
    with pytest.raises(StepError, match="memory suffices for no batch size: 4 and all below"):
        find_executable_batch_size(hungry, starting_batch_size=4)()
    with pytest.raises(ConfigurationError, match="reduce_batch_size_fn made 4 of 4"):
        find_executable_batch_size(hungry, starting_batch_size=4, reduce_batch_size_fn=lambda size: size)()


def train(batch_size: int, fails: str) -> tuple[int, float]:
    accelerator = Accelerator(DDP(device="cpu"), seed=0)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        with accelerator.accumulate(model):
            if accelerator.process_index == 1 and batch_size > 4 and step == 1 and fails == "inside":
                raise torch.OutOfMemoryError("CUDA out of memory")
            accelerator.backward(model(torch.ones(batch_size, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    if accelerator.process_index == 0 and batch_size > 4 and fails == "at the end":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if accelerator.process_index == 1 and fails == "otherwise":
        raise KeyError("of another kind")
    total = float(accelerator.reduce(model.weight.detach()).sum())
    accelerator.end_training()
    return batch_size, total


def search(fails: str) -> Any:
    return find_executable_batch_size(train, starting_batch_size=16, reduce_batch_size_fn=lambda size: size // 2)(fails)


@pytest.mark.parametrize("fails", ["inside", "at the end"])
def test_one_rank_without_memory_makes_all_begin_again(fails: str, ranks: RankPool) -> None:
    first, second = ranks(search, fails)
    assert first == second
    assert first[0] == 4


def test_another_error_of_one_rank_ends_the_search(ranks: RankPool) -> None:
    errors = ranks(search, "otherwise", return_exceptions=True)
    assert isinstance(errors[1], KeyError)
    assert isinstance(errors[0], Exception)


SEARCH_AND_LEAVE = """
import sys
from pathlib import Path
from accelerator import find_executable_batch_size
from test_batch_size import train
assert "torch._dynamo" not in sys.modules, "DistributedDataParallel is to be what imports it first"
search = find_executable_batch_size(train, starting_batch_size=8, reduce_batch_size_fn=lambda size: size // 2)
print(search("inside")[0])
threads = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
print([name for name in threads if "gloo" in name])
"""


def test_a_process_that_imports_little_before_begins_again_and_leaves_its_group(fresh: FreshProcesses) -> None:
    """Where anything still holds the group, its connections stay open, and the other rank waits until a timeout."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for rank in fresh(SEARCH_AND_LEAVE, nproc=2, env={"PYTHONPATH": paths}):
        assert (rank.returncode, rank.stdout) == (0, "4\n[]\n"), rank.stderr


def outside() -> None:
    accelerator = Accelerator(DDP(device="cpu"))
    try:
        find_executable_batch_size(train)("never")
    finally:
        accelerator.end_training()


def test_an_accelerator_outside_is_refused_on_several_ranks(ranks: RankPool) -> None:
    with pytest.raises(ConfigurationError, match="Build the Accelerator inside the function"):
        ranks(outside)


def train_and_resume(batch_size: int, strategy: Any, folder: str, error: str) -> tuple[int, list[int], Any]:
    """An epoch of five updates of eight samples; rank 1 has memory for three of them, and then for batches of two."""
    accelerator = Accelerator(strategy, global_batch_size=8, project_dir=folder)
    net = make_net()
    loader = DataLoader(blocks_data(), batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3), loader)
    accelerator.resume()
    steps: list[int] = []
    for x, y in loader:
        with accelerator.accumulate(model):
            if accelerator.process_index == 1 and batch_size > 2 and len(steps) == 3:
                run_out_of_memory(error)
            accelerator.backward(losses_of(model(x), y).mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            steps.append(accelerator.gradient_accumulation_steps)
            if len(steps) == 2 and batch_size > 2:
                accelerator.save_state()
    state = accelerator.get_state_dict(model)
    accelerator.end_training()
    return batch_size, steps, {name: value for name, value in state.items() if name != "seen"}


def run_out_of_memory(error: str) -> None:
    if error == "torch":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    torch.empty(2**55)  # the allocator of the CPU


def blocks_data() -> TensorDataset:
    x = torch.randn(38, 5, generator=torch.Generator().manual_seed(5))  # the last update has six
    return TensorDataset(x, x.sum(1).sin())


def search_and_resume(*arguments: Any) -> Any:
    halves = find_executable_batch_size(starting_batch_size=4, reduce_batch_size_fn=lambda size: size // 2)
    return halves(train_and_resume)(*arguments)


@pytest.mark.parametrize(("strategy", "error"), [(DDP(device="cpu"), "allocator"), (FSDP(device="cpu"), "torch")])
def test_half_the_batch_goes_on_with_the_same_numbers(
    strategy: Any, error: str, ranks: RankPool, tmp_path: Path
) -> None:
    """One rank runs out of memory in the fourth update; all go on after the second, with twice the accumulation."""
    one, other = ranks(search_and_resume, strategy, str(tmp_path), error)
    assert one[:2] == other[:2] == (2, [2, 2, 2])
    plain, _, expected = train_and_resume(8, "cpu", str(tmp_path / "plain"), "never")
    assert plain == 8
    for name, weight in expected.items():
        torch.testing.assert_close(one[2][name], weight, atol=2e-6, rtol=2e-6)
