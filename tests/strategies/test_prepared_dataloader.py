"""The prepared loader against plain DataLoaders and brute force, on one process and on several."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers
from rank_pool import RankPool
from strategies import DataError


def epochs_of(length: int, num_epochs: int, split_batches: bool, options: dict[str, Any]) -> list[list[list[int]]]:
    """(epoch, global batch, sample): what all ranks took, gathered without the loader's own bookkeeping."""
    accelerator = Accelerator(strategy="ddp", seed=3, split_batches=split_batches)
    loader = accelerator.prepare(DataLoader(Numbers(length), **options))
    epochs = []
    for _ in range(num_epochs):
        batches = []
        for batch in loader:
            batches.append(accelerator.gather_for_metrics(batch).tolist())
        assert len(batches) == len(loader)
        epochs.append(batches)
    return epochs


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_order_is_the_same_on_any_number_of_ranks(ranks: RankPool, shuffle: bool, drop_last: bool) -> None:
    options = {"batch_size": 6, "shuffle": shuffle, "drop_last": drop_last}
    one, two, three = (ranks(epochs_of, 25, 2, True, options, nproc=size) for size in (1, 2, 3))
    expected = one[0]
    assert two == [expected] * 2
    assert three == [expected] * 3
    assert sorted(sample for batch in expected[0] for sample in batch) == list(range(25)) or drop_last
    assert [len(batch) for batch in expected[0]] == [6] * 4 + [1] * (not drop_last)
    if shuffle:
        assert expected[0] != expected[1]
    else:
        assert expected[0] == [batch.tolist() for batch in DataLoader(Numbers(25), batch_size=6, drop_last=drop_last)]


def test_a_loaders_batch_size_is_that_of_one_rank_unless_split(ranks: RankPool) -> None:
    assert ranks(epochs_of, 12, 1, False, {"batch_size": 2}, nproc=3)[0] == [[list(range(6)), list(range(6, 12))]]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(ranks: RankPool, persistent: bool) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": "fork"}
    plain = {"batch_size": 3, "shuffle": True}
    assert ranks(epochs_of, 11, 2, False, plain | options) == ranks(epochs_of, 11, 2, False, plain)


@settings(max_examples=25)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    nproc=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_metrics_are_the_dataset_once(
    ranks: RankPool, length: int, batch_size: int, nproc: int, shuffle: bool, drop_last: bool
) -> None:
    if drop_last and length < batch_size * nproc:
        return
    options = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
    for epochs in ranks(epochs_of, length, 1, False, options, nproc=nproc):
        seen = [sample for batch in epochs[0] for sample in batch]
        kept = length // (batch_size * nproc) * batch_size * nproc if drop_last else length
        assert len(seen) == len(set(seen)) == kept
        if not shuffle:
            assert seen == list(range(kept))


def peek_then_run() -> list[Any]:
    accelerator = Accelerator(strategy="ddp", seed=0)
    loader = accelerator.prepare(DataLoader(Numbers(8), batch_size=2, shuffle=True))

    def run() -> list[int]:
        return [sample for batch in loader for sample in accelerator.gather_for_metrics(batch).tolist()]

    if accelerator.process_index == 1:
        next(iter(loader))
        for _ in loader:
            break
    first = run()
    if accelerator.process_index == 0:
        next(iter(loader))
    second = run()
    return [first, second, loader.epoch]


def test_a_peek_on_one_rank_changes_no_order(ranks: RankPool) -> None:
    one, two = ranks(peek_then_run)
    assert one == two
    first, second, epoch = one
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert epoch == 1


def train(accelerator: Accelerator, loader: Any, num_batches: int, model: Any = None) -> None:
    model = accelerator.prepare(nn.Linear(1, 1)) if model is None else model
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
        if index + 1 == num_batches:
            break


def epoch_after(num_batches: int) -> int:
    accelerator = Accelerator(strategy="cpu")
    loader = accelerator.prepare(DataLoader(Numbers(8), batch_size=2, shuffle=True))
    if num_batches:
        train(accelerator, loader, num_batches)
    else:
        next(iter(loader))
    next(iter(loader))
    return int(loader.epoch)


@pytest.mark.parametrize(("num_batches", "epoch"), [(0, 0), (1, 0), (4, 1)])
def test_an_epoch_is_over_once_all_of_it_was_trained_on(num_batches: int, epoch: int) -> None:
    assert epoch_after(num_batches) == epoch


def part_ways(use: str) -> None:
    accelerator = Accelerator(strategy="ddp")
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(8), batch_size=2))
    if accelerator.process_index == 1:
        list(loader)
    for batch in loader:
        if use == "gather_for_metrics":
            accelerator.gather_for_metrics(batch)
        elif use == "accumulate":
            train(accelerator, [batch], 1, model)
        else:
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())


@pytest.mark.parametrize("use", ["gather_for_metrics", "accumulate", "backward"])
def test_ranks_that_iterated_differently_are_told(ranks: RankPool, use: str) -> None:
    for error in ranks(part_ways, use, return_exceptions=True):
        assert isinstance(error, DataError), error
        assert "rank 0: epoch 0, batch 0; rank 1: epoch 1, batch 0" in str(error)


class Pair(NamedTuple):
    number: Tensor
    text: list[str]


@dataclasses.dataclass
class Batch:
    number: Tensor
    nested: dict[str, Tensor]


class Moving:
    def __init__(self, held: Tensor) -> None:
        self.held = held

    def to(self, device: torch.device) -> Moving:
        return Moving(self.held.to(device))


COLLATES = {
    "dict": lambda items: {"number": torch.stack(items), "text": [str(int(item)) for item in items]},
    "pair": lambda items: Pair(torch.stack(items), [str(int(item)) for item in items]),
    "dataclass": lambda items: Batch(torch.stack(items), {"double": 2 * torch.stack(items)}),
    "object": lambda items: Moving(torch.stack(items)),
}


@pytest.mark.parametrize("kind", COLLATES)
def test_batches_of_any_class(kind: str) -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(5), batch_size=2, collate_fn=COLLATES[kind]))
    plain = list(DataLoader(Numbers(5), batch_size=2, collate_fn=COLLATES[kind]))
    batches = list(loader)
    assert [type(batch) for batch in batches] == [type(batch) for batch in plain]
    assert [repr_of(batch) for batch in batches] == [repr_of(batch) for batch in plain]


def repr_of(batch: Any) -> str:
    return repr(batch.held if isinstance(batch, Moving) else batch)


class Own(DataLoader[Tensor]):
    """A loader with an argument, an attribute and a method of its own."""

    def __init__(self, *args: Any, factor: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def __iter__(self) -> Iterator[Any]:
        return (batch * self.factor for batch in super().__iter__())

    def scaled(self, number: int) -> int:
        return number * self.factor


def use_own() -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    loader = accelerator.prepare(Own(Numbers(7), batch_size=2, factor=10))
    assert isinstance(loader, Own)
    assert loader.scaled(3) == 30
    return [accelerator.gather_for_metrics(batch).tolist() for batch in loader]


def test_a_subclass_keeps_its_ways(ranks: RankPool) -> None:
    assert ranks(use_own) == [[[0, 10, 20, 30], [40, 50, 60]]] * 2


class Short(DataLoader[Tensor]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[:2])


def test_a_subclass_that_leaves_batches_out_is_told() -> None:
    loader = Accelerator(strategy="cpu").prepare(Short(Numbers(7), batch_size=2))
    with pytest.raises(DataError, match="the loader gave 2 instead of 4 batches"):
        list(loader)


def seeded(seed: int) -> DataLoader[Tensor]:
    return DataLoader(Numbers(20), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_the_users_generator_decides_the_order() -> None:
    orders = [[batch.tolist() for batch in Accelerator(strategy="cpu").prepare(seeded(seed))] for seed in (5, 6, 5)]
    assert orders[0] == orders[2] != orders[1]


def test_two_loaders_of_one_seed_have_orders_of_their_own() -> None:
    accelerator = Accelerator(strategy="cpu", seed=1)
    loaders = accelerator.prepare(*(DataLoader(Numbers(50), batch_size=50, shuffle=True) for _ in range(2)))
    first, second = (next(iter(loader)).tolist() for loader in loaders)
    assert first != second


def test_ranks_agree_on_the_order_without_a_seed(ranks: RankPool) -> None:
    for taken in ranks(unseeded):
        assert sorted(taken) == list(range(12))


def unseeded() -> list[int]:
    torch.manual_seed(int(os.environ["RANK"]))
    accelerator = Accelerator(strategy="ddp")
    loader = accelerator.prepare(DataLoader(Numbers(12), batch_size=2, shuffle=True))
    return [sample for batch in loader for sample in accelerator.gather_for_metrics(batch).tolist()]


def test_batches_left_out_of_training_are_told() -> None:
    accelerator = Accelerator(strategy="cpu")
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(6), batch_size=2))

    def skip_one() -> None:
        for index, batch in enumerate(loader):
            if index != 1:
                train(accelerator, [batch], 1, model)

    with pytest.warns(UserWarning, match="1 of the 3 batches of this epoch were taken but not trained on"):
        skip_one()


def test_pickling_gives_a_loader_that_can_be_prepared_again() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(6), batch_size=2))
    copied = pickle.loads(pickle.dumps(loader))
    assert type(copied) is DataLoader
    again = Accelerator(strategy="cpu").prepare(copied)
    assert again.global_batch_size == 2
    assert [batch.tolist() for batch in again] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("how", ["freed", "forgotten"])
def test_persistent_workers_end_at_once_with_their_loader(how: str) -> None:
    # Torch waits 5 s for each worker that it cannot end. Other load can make one try as slow.
    assert any(seconds_to_end_workers(how) < 4 for _ in range(3))


def seconds_to_end_workers(how: str) -> float:
    accelerator = Accelerator(strategy="cpu")
    loader = accelerator.prepare(DataLoader(Numbers(8), batch_size=2, num_workers=2, persistent_workers=True))
    list(loader)
    start = time.monotonic()
    del loader
    if how == "freed":
        accelerator.free_memory()
    del accelerator
    gc.collect()
    return time.monotonic() - start


def lengths_of_copies() -> tuple[int, int]:
    original = DataLoader(Numbers(10), batch_size=2)
    loader = Accelerator(strategy="ddp").prepare(original)
    return len(original), len(pickle.loads(pickle.dumps(loader)))


def test_pickling_gives_the_users_own_loader_on_two_ranks(ranks: RankPool) -> None:
    assert ranks(lengths_of_copies) == [(5, 5)] * 2


class Broken(Numbers):
    def __getitem__(self, index: int) -> Tensor:
        if index == 11:
            raise KeyError("the file of sample 11 is gone")
        return torch.ones(1) * index


def train_on_broken_data(workers: int) -> None:
    accelerator = Accelerator(strategy="ddp")
    context = "fork" if workers else None
    loader = DataLoader(Broken(12), batch_size=2, num_workers=workers, multiprocessing_context=context)
    model, loader = accelerator.prepare(nn.Linear(1, 1), loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_while_reading_names_the_samples_on_every_rank(ranks: RankPool, workers: int) -> None:
    other, own = ranks(train_on_broken_data, workers, return_exceptions=True)
    assert isinstance(own, KeyError)
    assert "the file of sample 11 is gone" in str(own)
    assert "reading batch 2 of epoch 0, samples [10, 11]: KeyError" in str(other)
    assert "the file of sample 11 is gone" in str(other)
