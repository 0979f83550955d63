"""`find_executable_batch_size` tries smaller sizes, on all ranks alike, and lets other errors pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator, find_executable_batch_size
from rank_pool import RankPool
from strategies import DDP, ConfigurationError, StepError


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


def outside() -> None:
    accelerator = Accelerator(DDP(device="cpu"))
    try:
        find_executable_batch_size(train)("never")
    finally:
        accelerator.end_training()


def test_an_accelerator_outside_is_refused_on_several_ranks(ranks: RankPool) -> None:
    with pytest.raises(ConfigurationError, match="Build the Accelerator inside the function"):
        ranks(outside)
