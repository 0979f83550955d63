"""Loaders with every kind of sampler, and a loop over them that can be stopped and continued."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers
from rank_pool import RankPool

LOADERS: dict[str, Any] = {
    "shuffled": lambda n, b, w: DataLoader(Numbers(n), batch_size=b, shuffle=True, num_workers=w),
    "in order": lambda n, b, w: DataLoader(Numbers(n), batch_size=b, num_workers=w),
    "dropping": lambda n, b, w: DataLoader(Numbers(n), batch_size=b, shuffle=True, drop_last=True, num_workers=w),
    "weighted": lambda n, b, w: DataLoader(
        Numbers(n), batch_size=b, sampler=WeightedRandomSampler([1.0 + i % 3 for i in range(n)], n), num_workers=w
    ),
    "subset": lambda n, b, w: DataLoader(
        Numbers(2 * n), batch_size=b, sampler=SubsetRandomSampler(range(n)), num_workers=w
    ),
    "replacement": lambda n, b, w: DataLoader(
        Numbers(n), batch_size=b, sampler=RandomSampler(Numbers(n), replacement=True), num_workers=w
    ),
    "own": lambda n, b, w: DataLoader(Numbers(n), batch_size=b, sampler=Shuffles(n), num_workers=w),
    "buckets": lambda n, b, w: DataLoader(Numbers(n), batch_sampler=Buckets(n, b), num_workers=w),
    "batched": lambda n, b, w: DataLoader(
        Numbers(n), batch_sampler=BatchSampler(RandomSampler(range(n)), b, drop_last=False), num_workers=w
    ),
    "items": lambda n, b, w: DataLoader(Numbers(n), batch_size=None, shuffle=True, num_workers=w),
}


class Shuffles(Sampler[int]):
    """Draws from generators of every kind, one of them its own."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = self.own.permutation(self.length).tolist()
        random.shuffle(order)
        for index in order:
            yield (index + int(torch.randint(self.length, ())) + int(np.random.randint(self.length))) % self.length


class Buckets(Sampler[list[int]]):
    """Batches of neighbours, of one to `largest` samples, in random order."""

    def __init__(self, length: int, largest: int) -> None:
        self.sizes = [1 + place % largest for place in range(length)]
        ends = np.cumsum(self.sizes)
        self.batches = [list(range(end - size, min(end, length))) for size, end in zip(self.sizes, ends, strict=True)]
        self.batches = [batch for batch in self.batches if batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from (self.batches[place] for place in torch.randperm(len(self)).tolist())


def run(
    kind: str, length: int, batch: int, workers: int, state: dict[str, Any] | None, stop: int | None, epochs: int = 1
) -> tuple[list[Any], dict[str, Any]]:
    """Global batches over `epochs`, stopped after `stop` of them; and the position there, once through JSON."""
    accelerator = Accelerator(strategy="auto", seed=4)
    loader = accelerator.prepare(LOADERS[kind](length, batch, workers))
    if state is not None:
        loader.load_state_dict(state)
    taken: list[Any] = []
    for _ in range(epochs):
        for values in loader:
            gathered = accelerator.gather_for_metrics(values).tolist()
            taken.append(gathered)
            if len(taken) == stop:
                return taken, json.loads(json.dumps(loader.state_dict()))
    return taken, json.loads(json.dumps(loader.state_dict()))


def flat(batches: list[Any]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def on(ranks: RankPool, nproc: int, function: Any, *arguments: Any) -> Any:
    return function(*arguments) if nproc == 1 else ranks(function, *arguments, nproc=nproc)[0]
