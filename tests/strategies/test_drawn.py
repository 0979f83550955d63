"""Samplers and batch samplers of the user's own: drawn alike on all ranks, with the gradients of one process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers
from rank_pool import RankPool
from sampled_loaders import LOADERS, flat, run
from strategies import DataError
from strategies.drawn import DrawnOrder, Repeat


def test_ranks_draw_a_samplers_order_alike_from_different_generators(ranks: RankPool) -> None:
    for kind in ("weighted", "own", "buckets"):
        one, two = ranks(draw_apart, kind)
        assert one == two
        assert one[0] != one[1], "epochs differ"


def draw_apart(kind: str) -> list[Any]:
    accelerator = Accelerator(strategy="ddp", seed=1)
    loader = accelerator.prepare(LOADERS[kind](20, 4, 0))
    torch.manual_seed(accelerator.process_index)
    random.seed(accelerator.process_index)
    return [[accelerator.gather_for_metrics(batch).tolist() for batch in loader] for _ in range(2)]


DIGEST = """
from strategies.drawn import _packed
print(_packed([frozenset({"a", "b", "c", "d", str(number)}) for number in range(8)])[1])
print(_packed([("x", {"k": {"a", "b", "c", "d"}}), object()])[1])
"""


def test_sets_among_indices_have_one_digest_in_all_processes() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_a_samplers_draws_leave_the_loops_generators_alone() -> None:
    loader = Accelerator(strategy="cpu", seed=1).prepare(LOADERS["own"](20, 4, 0))
    before = random.getstate(), np.random.get_state()[1].tolist()
    list(loader)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class Remembering(Sampler[int]):
    """A sampler whose order depends on a state of its own."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(index * (2 * self.passes + 1)) % 8 for index in range(8)])


class Saved(Remembering):
    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


@pytest.mark.parametrize("taken", [2, 4, 6])
def test_a_samplers_own_state_travels_with_the_position(taken: int) -> None:
    first = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(8), batch_size=2, sampler=Saved()))
    whole = [batch.tolist() for _ in range(2) for batch in first]
    first = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(8), batch_size=2, sampler=Saved()))
    state: dict[str, Any] = {}
    count = 0
    for _ in range(2):
        for _ in first:
            count += 1
            if count == taken:
                state = first.state_dict()
    second = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(8), batch_size=2, sampler=Saved()))
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert [batch.tolist() for _ in range(2 - state["epoch"]) for batch in second] == whole[taken:]


def test_a_sampler_that_cannot_repeat_its_order_is_told() -> None:
    first = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(8), batch_size=2, sampler=Remembering()))
    list(first)
    next(iter(first))
    second = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(8), batch_size=2, sampler=Remembering()))
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="Remembering gave another order for epoch 1 than in the run"):
        next(iter(second))


class Lying(Remembering):
    def __len__(self) -> int:
        return 9


def test_a_sampler_that_gives_fewer_than_it_says_is_told() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(9), batch_size=2, sampler=Lying()))
    with pytest.raises(DataError, match="Lying gave 8, and had length 9 when its loader was prepared"):
        list(loader)


def windows(kind: str, stop: int) -> tuple[list[float], list[float]]:
    """The weights of one linear layer after each step, trained on all, or stopped and continued on one process."""
    accelerator = Accelerator(strategy="ddp", seed=4, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Linear(1, 1, dtype=torch.float64)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), LOADERS[kind](13, 2, 0)
    )
    path, counts = [], []
    for batch in loader:
        values = batch.double().reshape(-1, 1)
        with accelerator.accumulate(model):
            accelerator.backward((model(values) - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        counts.append(len(accelerator.gather_for_metrics(batch.reshape(-1))))
        if accelerator.sync_gradients:
            path.append(accelerator.unwrap_model(model).weight.item())
    return path, counts


@pytest.mark.parametrize("kind", ["weighted", "buckets", "items"])
def test_gradients_over_a_samplers_batches_are_those_of_one_process(ranks: RankPool, kind: str) -> None:
    """Two ranks with windows of two micro-batches, against plain torch over the same samples."""
    paths = ranks(windows, kind, 0)
    assert paths[0] == paths[1]
    path, counts = paths[0]
    samples = flat(run(kind, 13, 2, 0, None, None)[0])
    torch.manual_seed(0)
    plain = nn.Linear(1, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    expected, begin = [], 0
    for first in range(0, len(counts), 2):
        number = sum(counts[first : first + 2])
        window = torch.tensor(samples[begin : begin + number], dtype=torch.float64).reshape(-1, 1)
        begin += number
        optimizer.zero_grad()
        (plain(window) - 1).square().mean().backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        expected.append(plain.weight.item())
    assert begin == len(samples)
    assert path == pytest.approx(expected, rel=1e-9)


def test_split_batches_of_a_batch_sampler(ranks: RankPool) -> None:
    batches = [[0, 1, 2], [3], [4, 5]]
    assert ranks(split, batches) == [([[0, 1, 2], [3], [4, 5]], 3)] * 2


def split(batches: list[list[int]]) -> tuple[list[Any], int]:
    accelerator = Accelerator(strategy="ddp", split_batches=True)
    loader = accelerator.prepare(DataLoader(Numbers(6), batch_sampler=batches))
    return [accelerator.gather_for_metrics(batch).tolist() for batch in loader], len(loader)


def test_an_empty_batch_of_a_batch_sampler_is_named() -> None:
    loader = Accelerator(strategy="cpu").prepare(
        DataLoader(Numbers(6), batch_sampler=BatchesWithOneEmpty([], 1, False))
    )
    with pytest.raises(DataError, match="gave an empty batch, number 1 of epoch 0"):
        list(loader)


class BatchesWithOneEmpty(BatchSampler):
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], []])


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("of_batches", [False, True])
def test_indices_that_come_again_are_numbered(kind: Any, of_batches: bool) -> None:
    drawn = [kind(index) for index in np.random.default_rng(0).integers(0, 9, 60).tolist()]
    expected = [Repeat(index, drawn[:place].count(index)) for place, index in enumerate(drawn)]
    batches = [drawn[start : start + 7] for start in range(0, 60, 7)]
    given: Any = batches if of_batches else drawn
    order = DrawnOrder(given, len(given), 0, marks_repeats=True, of_batches=of_batches)
    order.begin(0)
    got = order.indices(np.arange(len(given)), 0)
    plain = flat(got) if of_batches else got
    assert [one if isinstance(one, Repeat) else Repeat(one, 0) for one in plain] == expected
    assert not of_batches or [len(batch) for batch in got] == [len(batch) for batch in batches]
