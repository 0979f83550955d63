"""Windows in loops as people write them: evaluation inside, batches skipped or used twice, loops of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerator import Accelerator
from loops import assert_close, prepared, sgd, step, train_plain
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import StepError

# -- an eval loop inside ---------------------------------------------------------------------------------------


def train_with_evaluation(case: Case, how: str) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    held_out = accelerator.prepare(DataLoader(TensorDataset(torch.zeros(9, 3).double()), batch_size=2))
    held_open = []
    for number, (x, y, _) in enumerate(loader):
        if how == "left by break":
            model.eval()
            for (inputs,) in held_out:
                with torch.no_grad():
                    model(inputs)
                if number % 2:
                    break
            model.train()
        elif how == "held open":
            with torch.no_grad():
                iterator = iter(held_out)
                model(next(iterator)[0])
                held_open.append(iterator)
        elif how == "named":
            iterator = iter(held_out)
            next(iterator)
            held_open.append(iterator)
        with accelerator.accumulate(model, loader=loader if how == "named" else None):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("how", ["left by break", "held open", "named"])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_inside_the_loop_disturbs_nothing(ranks: RankPool, how: str, world: int) -> None:
    case = Case(length=15, world=world, steps=2)
    for weights in ranks(train_with_evaluation, case, how, nproc=world):
        assert_close(weights, train_plain(case))


def test_another_loader_held_open_with_gradients_must_be_told_apart() -> None:
    accelerator, model, _, loader = prepared(Case(length=15))
    other = accelerator.prepare(DataLoader(TensorDataset(torch.zeros(9, 3).double()), batch_size=2))
    iterator, held_open = iter(loader), iter(other)
    next(iterator)
    next(held_open)
    with (
        pytest.raises(StepError, match=r"two prepared loaders are open, .*15 samples.*9 samples.*loader=loader"),
        accelerator.accumulate(model),
    ):
        pass


def test_a_named_loader_must_hold_a_batch() -> None:
    accelerator, model, _, loader = prepared(Case())
    with (
        pytest.raises(StepError, match="gave no batch that the loop still holds"),
        accelerator.accumulate(model, loader=loader),
    ):
        pass


# -- batches that are not trained on as planned ----------------------------------------------------------------


def train_skipping(case: Case, skipped: int, twice: int) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* batches of this epoch were taken but not trained on")
        for number, (x, y, _) in enumerate(loader):
            if number == skipped:
                continue
            step(accelerator, model, optimizer, x, y)
            if number == twice:
                step(accelerator, model, optimizer, x, y)
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_skipped_with_continue_leaves_its_weight_to_the_others(ranks: RankPool, world: int) -> None:
    case = Case(length=6 * world + 1, world=world, steps=3)
    g = case.global_batch
    first = [*range(g), *range(2 * g, case.length)]  # 0, 2 and the tail
    for weights in ranks(train_skipping, case, 1, -1, nproc=world):
        assert_close(weights, train_plain(case, [first]))


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_used_twice_weighs_twice(ranks: RankPool, world: int) -> None:
    case = Case(length=6 * world + 1, world=world, steps=3)
    g = case.global_batch
    windows = [[*range(g), *range(g), *range(g, 2 * g)], [*range(2 * g, case.length)]]
    for weights in ranks(train_skipping, case, -1, 0, nproc=world):
        assert_close(weights, train_plain(case, windows))


def test_batches_without_backward_are_counted_but_weigh_nothing() -> None:
    case = Case(length=8, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            if number != 1:
                accelerator.backward(sample_losses(model, x, y).mean(), weight=len(x))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case, [[0, 1], [4, 5, 6, 7]]))


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_left_by_break_and_entered_again_trains_as_if_it_had_not_been(ranks: RankPool, world: int) -> None:
    case = Case(length=8 * world, world=world, steps=2)
    for weights in ranks(train_left_by_break, case, nproc=world):
        assert_close(weights, train_plain(case))


def train_left_by_break(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        step(accelerator, model, optimizer, x, y)
        if number == 2:
            break
    for x, y, _ in loader:
        step(accelerator, model, optimizer, x, y)
    return flat(model)


def read_ahead(batches: Any) -> Iterator[Any]:
    held = None
    for batch in batches:
        if held is not None:
            yield held
        held = batch
    yield held


def train_reading_ahead(case: Case) -> None:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in read_ahead(loader):
        step(accelerator, model, optimizer, x, y)


def test_reading_one_batch_ahead_warns() -> None:
    with pytest.warns(UserWarning, match=r"1 of the 5 batches .* not trained on.*reads ahead"):
        train_reading_ahead(Case(length=10))


# -- no prepared loader, streams, loops of one's own -----------------------------------------------------------


def train_without_loader(case: Case) -> Tensor:
    accelerator = Accelerator("ddp", gradient_accumulation_steps=case.steps)
    model = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    x, y, _ = make_data(case).tensors
    for samples in torch.arange(case.length).split(case.global_batch):
        mine = samples.chunk(case.world)[accelerator.process_index]
        step(accelerator, model, optimizer, x[mine], y[mine])
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_without_a_prepared_loader_is_right_for_equal_batches(ranks: RankPool, world: int) -> None:
    case = Case(length=8 * world, world=world, steps=2)
    for weights in ranks(train_without_loader, case, nproc=world):
        assert_close(weights, train_plain(case))


class Stream(IterableDataset[Any]):
    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))


@pytest.mark.parametrize("length", [8, 9, 11])
def test_a_stream_is_weighed_by_what_it_gave(length: int) -> None:
    case = Case(length=length, steps=2)
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(Stream(make_data(case)), batch_size=2))
    for x, y, _ in loader:
        step(accelerator, model, optimizer, x, y)
    assert_close(flat(model), train_plain(case))


def train_with_no_sync(case: Case) -> tuple[Tensor, bool]:
    accelerator, model, optimizer, loader = prepared(Case(length=case.length, world=case.world))
    differed = False
    for number, (x, y, _) in enumerate(loader):
        if number % 2 == 0:
            with accelerator.no_sync(model):
                accelerator.backward(0.5 * sample_losses(model, x, y).mean())
            everyone = accelerator.gather(model[2].bias.grad)
            differed |= everyone[0].item() != everyone[-1].item()
        else:
            accelerator.backward(0.5 * sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model), differed


def test_no_sync_by_hand_keeps_gradients_local(ranks: RankPool) -> None:
    case = Case(length=16, world=2, steps=2)
    for weights, differed in ranks(train_with_no_sync, case):
        assert differed
        assert_close(weights, train_plain(case))
