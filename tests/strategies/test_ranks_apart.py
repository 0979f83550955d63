"""Ranks whose loaders differ would repeat samples and lose others: they are told what each of them brought."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import BatchSampler, ChainDataset, ConcatDataset, DataLoader, Sampler, Subset, random_split

from accelerator import Accelerator
from datasets_of_numbers import Numbers, Stream
from rank_pool import RankPool
from strategies import DataError

datasets.disable_progress_bars()


class Hidden(Sampler[int]):
    """Draws from a generator that nobody can find: in a list, or made while it draws."""

    def __init__(self, length: int, *, held: bool) -> None:
        self.length = length
        self.generators = [random.Random(os.getpid())] if held else []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        (self.generators[0] if self.generators else random.Random(os.getpid())).shuffle(order)
        return iter(order)


class Sharding(Sampler[int]):
    """Cuts by rank without being a `DistributedSampler`."""

    def __init__(self, length: int) -> None:
        self.length, self.rank, self.num_replicas = length, dist.get_rank(), dist.get_world_size()

    def __len__(self) -> int:
        return self.length // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.length, self.num_replicas))


def make(kind: str, rank: int) -> DataLoader[Any]:
    data, halves = Numbers(20), slice(rank, 20, 2)
    table = datasets.Dataset.from_dict({"x": list(range(20))})
    torch.manual_seed(rank)
    np.random.seed(rank)
    makers: dict[str, Any] = {
        "length": lambda: DataLoader(Numbers(20 + rank), 2),
        "batch": lambda: DataLoader(data, 2 + rank),
        "drop_last": lambda: DataLoader(data, 2, drop_last=bool(rank)),
        "shuffle": lambda: DataLoader(data, 2, shuffle=bool(rank)),
        "dataset": lambda: DataLoader(list(range(20)) if rank else data, 2),  # type: ignore[arg-type]
        "unseeded split": lambda: DataLoader(random_split(data, [12, 8])[0], 2),
        "unseeded split inside": lambda: DataLoader(ConcatDataset([random_split(data, [12, 8])[0], data]), 2),
        "every second": lambda: DataLoader(Subset(data, range(20)[halves]), 2),
        "every second, listed": lambda: DataLoader(Subset(data, list(range(20))[halves]), 2),
        "workers of a stream": lambda: DataLoader(Stream(20), 2, num_workers=rank),
        "batch of a stream": lambda: DataLoader(Stream(20), 2 + rank),
        "own sharding": lambda: DataLoader(data, 2, sampler=Sharding(20)),
        "own sharding in batches": lambda: DataLoader(data, batch_sampler=BatchSampler(Sharding(20), 2, False)),
        "split by node": lambda: DataLoader(split_dataset_by_node(table.to_iterable_dataset(4), rank, 2), 2),
        "unseeded rows": lambda: DataLoader(table.shuffle(), 2),
    }
    return makers[kind]()  # type: ignore[no-any-return]


def prepare(kind: str) -> None:
    accelerator = Accelerator(strategy="ddp", seed=0)
    accelerator.prepare(make(kind, accelerator.process_index))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("length", "rank 0: Numbers of 20, .* rank 1: Numbers of 21, "),
        ("batch", "rank 0: .*batch_size=2, .* rank 1: .*batch_size=3, "),
        ("drop_last", "drop_last=False; .*drop_last=True"),
        ("shuffle", "SequentialSampler of 20, .*RandomSampler of 20, "),
        ("dataset", "rank 0: Numbers of 20, .*; rank 1: list of 20, "),
        ("unseeded split", "different loaders .*Subset of 12, indices .*manual_seed"),
        ("unseeded split inside", "different loaders .*ConcatDataset of 32, Subset of 12, indices "),
        ("every second", r"different loaders .*range\(0, 20, 2\)"),
        ("every second, listed", r"different loaders .*\[0, 2, 4"),
        ("workers of a stream", "different loaders .*num_workers=0; .*num_workers=1"),
        ("batch of a stream", "different loaders .*batch_size=2, .*batch_size=3"),
        ("own sharding", "the loader already has a Sharding"),
        ("own sharding in batches", "the loader already has a Sharding"),
        ("split by node", "already cut by split_dataset_by_node"),
        ("unseeded rows", "different loaders .*Dataset of 20, indices "),
    ],
)
def test_loaders_that_differ_between_ranks_are_refused(ranks: RankPool, kind: str, words: str) -> None:
    for error in ranks(prepare, kind, return_exceptions=True):
        assert isinstance(error, DataError), error
        with pytest.raises(DataError, match=words):
            raise error


def half_of_rows() -> None:
    accelerator = Accelerator(strategy="ddp", seed=0)
    whole = datasets.Dataset.from_dict({"x": list(range(20))})
    accelerator.prepare(DataLoader(whole, 2))
    with pytest.warns(UserWarning, match="the fingerprints of Dataset differ between ranks"):
        accelerator.prepare(DataLoader(split_dataset_by_node(whole, accelerator.process_index, 2), 2))


def test_rows_that_may_differ_are_warned_of(ranks: RankPool) -> None:
    ranks(half_of_rows)


def read_alone() -> list[list[float]]:
    accelerator = Accelerator(strategy="ddp", seed=0, dispatch_batches=True)
    data: Any = Stream(8) if accelerator.is_main_process else ChainDataset([])
    loader = accelerator.prepare(DataLoader(data, 2, num_workers=accelerator.process_index))
    return [sample for batch in loader for sample in accelerator.gather_for_metrics(batch).tolist()]


def test_what_rank_0_reads_for_all_need_not_be_held_by_the_others(ranks: RankPool) -> None:
    assert ranks(read_alone) == [[[float(number)] for number in range(8)]] * 2


def use(held: bool, trains: bool, batches: bool) -> None:
    accelerator = Accelerator(strategy="ddp", seed=0)
    sampler: Any = Hidden(13, held=held)
    options = {"batch_sampler": BatchSampler(sampler, 3, False)} if batches else {"batch_size": 3, "sampler": sampler}
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(13), **options))
    for batch in loader:
        if trains:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
        else:
            accelerator.gather_for_metrics(batch)


@pytest.mark.parametrize(
    ("held", "trains", "batches"), [(True, True, False), (False, True, True), (False, False, False)]
)
def test_a_sampler_that_draws_apart_is_refused_at_its_first_batch(
    ranks: RankPool, held: bool, trains: bool, batches: bool
) -> None:
    for error in ranks(use, held, trains, batches, return_exceptions=True):
        assert isinstance(error, DataError), error
        assert "gave another order on every rank for epoch 0 (rank 0: digest " in str(error)
