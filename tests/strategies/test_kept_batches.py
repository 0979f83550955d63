"""Batches that the loop keeps and trains on after their pass has ended: nobody knows what they weigh."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from accelerator import Accelerator
from loops import assert_close, prepared, step, train_plain
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import StepError


def kept(loader: Any, how: str, epochs: int) -> Any:
    if how == "list":
        return list(loader)
    return itertools.islice(itertools.cycle(loader), epochs * len(loader))


def refused(case: Case, how: str) -> str:
    with pytest.raises(StepError) as raised:
        train_kept(case, how)
    return str(raised.value)


def train_kept(case: Case, how: str, epochs: int = 2) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in kept(loader, how, epochs):
        step(accelerator, model, optimizer, x, y)
    return flat(model)


@pytest.mark.parametrize("how", ["list", "cycle"])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=22, batch_size=4, steps=3),  # the last batch is shorter
        Case(length=3, steps=2),  # of two batches
        Case(length=5, world=2),  # one rank has a ghost
    ],
)
def test_kept_batches_of_different_sizes_are_refused(ranks: RankPool, case: Case, how: str) -> None:
    for message in ranks(refused, case, how, nproc=case.world):
        assert f"TensorDataset of {case.length} samples" in message
        assert "while True:" in message


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data(Case(length=7)))


def test_kept_batches_of_a_stream_are_refused() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    model = make_model()
    model, loader = accelerator.prepare(model, DataLoader(Numbers(), batch_size=2))
    (x, y, _), *_ = batches = list(loader)
    assert len(batches) == 4
    with pytest.raises(StepError, match="the loop over Numbers"), accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())


@pytest.mark.parametrize("how", ["list", "cycle"])
def test_kept_batches_of_one_size_are_right(how: str) -> None:
    case = Case(length=16, steps=2)
    assert_close(train_kept(case, how, epochs=1), train_plain(case))


def test_kept_batches_with_weights_of_their_own_are_right() -> None:
    case = Case(length=7, steps=4)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in list(loader):
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean(), weight=len(x))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case))


def weigh_ghosts() -> str:
    accelerator, model, _, loader = prepared(Case(length=5, world=2))
    batches = list(loader)
    with pytest.raises(StepError) as raised, accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, *batches[-1][:2]).mean(), weight=len(batches[-1][0]))
    return str(raised.value)


def test_a_weight_does_not_make_a_ghost_known(ranks: RankPool) -> None:
    for message in ranks(weigh_ghosts):
        assert "weight=" not in message


# -- data of the loop's own, after a pass that ended -------------------------------------------------------------


def train_after(how: str) -> Tensor:
    """Train on equal batches of the loop's own, after a pass over 15 samples in batches of 2 a rank."""
    accelerator = Accelerator("ddp", gradient_accumulation_steps=2)
    case = Case(length=8 * accelerator.num_processes, world=accelerator.num_processes, steps=2)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)
    model, optimizer = accelerator.prepare(model, optimizer)
    other = accelerator.prepare(DataLoader(make_data(Case(length=15)), batch_size=2))
    labels, losses = [], []
    if how == "trained":
        critic = nn.Linear(3, 1).double()
        critic, critics = accelerator.prepare(critic, torch.optim.SGD(critic.parameters(), lr=0.1))
    for inputs, targets, _ in other:
        if how == "evaluated":
            with torch.no_grad():
                losses.append(sample_losses(model, inputs, targets))
        elif how == "evaluated with gradients":
            losses.append(sample_losses(model, inputs, targets).mean().item())
        elif how == "trained":
            with accelerator.accumulate(critic):
                accelerator.backward(critic(inputs).mean())
                critics.step()
                critics.zero_grad()
        labels.append(targets)
    x, y, _ = make_data(case).tensors
    for samples in torch.arange(case.length).split(case.global_batch):
        mine = samples.chunk(case.world)[accelerator.process_index]
        step(accelerator, model, optimizer, x[mine], y[mine])
    assert labels
    return flat(model)


@pytest.mark.parametrize("how", ["evaluated", "evaluated with gradients", "trained", "only looked at"])
@pytest.mark.parametrize("world", [1, 2])
def test_data_of_the_loops_own_is_weighed_equally(ranks: RankPool, how: str, world: int) -> None:
    for weights in ranks(train_after, how, nproc=world):
        assert_close(weights, train_plain(Case(length=8 * world, world=world, steps=2)))


def test_tensors_that_the_dataset_keeps_are_not_the_loops() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    x, y, _ = make_data(Case(length=9)).tensors
    whole: Any = list(zip(x.split([3, 2, 4]), y.split([3, 2, 4]), strict=True))  # batches that are ready
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(whole, batch_size=None))
    for batch in loader:
        step(accelerator, model, optimizer, *batch)
    before = flat(model).clone()
    for _ in range(2):  # on data of the loop's own
        step(accelerator, model, optimizer, torch.ones_like(x[:2]), torch.ones_like(y[:2]))
    assert not torch.equal(flat(model), before)


def test_kept_batches_do_not_weigh_anything_in_a_window_of_one() -> None:
    assert_close(train_kept(Case(length=7), "list"), train_plain(Case(length=7)))
