"""Ranks that are in different calls hear of it, instead of taking each other's bytes for their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DDP, CollectiveError, StepError, World, collectives


def join() -> World:
    return DDP(device="cpu").setup()


def call_apart() -> str:
    world, one = join(), torch.ones(())
    with pytest.raises(CollectiveError) as raised:
        (collectives.reduce if world.rank else collectives.gather)(one, world)
    collectives.barrier(world)  # the group is as good as before
    return str(raised.value)


def test_ranks_in_different_calls_hear_of_it(ranks: RankPool) -> None:
    for message in ranks(call_apart):
        assert "rank 0: gather; rank 1: reduce" in message


def skip_on_one_rank() -> str:
    """Rank 0 skips a micro-batch inside the window; it alone then asks for the window's true weight."""
    accelerator = Accelerator("ddp", gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2))

    def loop() -> None:
        for index, (x,) in enumerate(loader):
            with accelerator.accumulate(model):
                if index == 0 and accelerator.is_main_process:
                    continue
                accelerator.backward(model(x).mean())
                optimizer.step()
                optimizer.zero_grad()
        accelerator.gather(torch.ones(()))

    with pytest.raises(CollectiveError) as raised:
        loop()
    return str(raised.value)


def test_a_batch_skipped_on_one_rank_only_is_no_silent_weight(ranks: RankPool) -> None:
    for message in ranks(skip_on_one_rank):
        assert "rank 0: the sum of a window's weights" in message
        assert "rank 1: gather" in message


def leave_out_a_step() -> str:
    accelerator = Accelerator("ddp")
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2))

    def epoch(left_out: int) -> None:
        for index, (x,) in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).mean())
                if index != left_out:
                    optimizer.step()
                optimizer.zero_grad()

    epoch(left_out=0)
    epoch(left_out=1 if accelerator.process_index else -1)
    with pytest.raises(StepError) as raised:
        epoch(left_out=-1)
    return str(raised.value)


def test_a_step_left_out_on_one_rank_is_noticed_in_the_next_pass(ranks: RankPool) -> None:
    for message in ranks(leave_out_a_step):
        assert "different numbers of optimizer steps (rank 0: 3; rank 1: 2)" in message
