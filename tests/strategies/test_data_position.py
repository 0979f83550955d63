"""Where a loop stands in its data: stopped anywhere, continued on anything, every sample comes once and in order."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers
from rank_pool import RankPool
from sampled_loaders import LOADERS, flat, on, run
from strategies.sharding import ComputedOrder, Cut, ShardedBatchSampler, permute


def whole_order(length: int, shuffle: bool, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(length), length, seed, epoch).tolist() if shuffle else list(range(length))


STAGES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 200), shuffle=st.booleans(), epoch=st.integers(0, 3), stages=STAGES)
def test_stages_of_any_world_and_batch_take_the_epoch_in_its_order(
    length: int, shuffle: bool, epoch: int, stages: list[tuple[int, int, int]]
) -> None:
    """Each stage: a number of ranks, a batch per rank, and after how many global batches it stops; the last never."""
    whole, taken, position = whole_order(length, shuffle, 9, epoch), list[int](), 0
    for number, (world_size, per_rank, stop) in enumerate(stages):
        cut = Cut(length, per_rank * world_size, world_size, drop_last=False)
        samplers = [
            ShardedBatchSampler(cut, rank, ComputedOrder(length, 9, shuffle=shuffle)) for rank in range(world_size)
        ]
        plan, *_ = [sampler.begin(epoch, position) for sampler in samplers]
        taken_before = len(taken)
        for index, parts in enumerate(zip(*samplers, strict=True)):
            if index == stop and number < len(stages) - 1:
                break
            batch = [sample for rank, part in enumerate(parts) if plan.local_samples(index, rank) for sample in part]
            assert batch == whole[position : position + per_rank * world_size]
            taken += batch
            position = plan.position_after(index)
        assert plan.window_samples(0, plan.num_batches) == length - taken_before
    assert taken == whole


@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_equals_never_stopped(kind: str) -> None:
    whole, _ = run(kind, 23, 3, 0, None, None, epochs=3)
    number = len(whole) // 3
    for stop in (1, number - 1, number, number + 2):
        before, state = run(kind, 23, 3, 0, None, stop, epochs=3)
        assert before == whole[:stop]
        after, _ = run(kind, 23, 3, 0, state, None, epochs=3 - state["epoch"])
        assert after == whole[stop:], stop


@pytest.mark.parametrize("kind", ["shuffled", "buckets", "items"])
def test_any_number_of_workers_resumes_the_same(kind: str) -> None:
    whole, _ = run(kind, 23, 3, 0, None, None, epochs=2)
    stop = len(whole) // 2 + 2
    before, state = run(kind, 23, 3, 1, None, stop, epochs=2)
    after, _ = run(kind, 23, 3, 2, state, None)
    assert (before, after) == (whole[:stop], whole[stop:])


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes long
@given(
    kind=st.sampled_from([kind for kind in LOADERS if kind != "dropping"]),
    length=st.integers(1, 40),
    first=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    second=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    stop=st.integers(1, 9),
)
def test_another_world_and_batch_take_the_rest(
    ranks: RankPool, kind: str, length: int, first: tuple[int, int], second: tuple[int, int], stop: int
) -> None:
    if kind == "buckets":  # the batches are those of the batch sampler, which is the same in both
        second = second[0], first[1]
    whole, _ = run(kind, length, first[1], 0, None, None)
    before, state = on(ranks, first[0], run, kind, length, first[1], 0, None, stop)
    after = [] if state["epoch"] else on(ranks, second[0], run, kind, length, second[1], 0, state, None)[0]
    assert flat(before) + flat(after) == flat(whole)


class Counting(Dataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor(index)


def test_nothing_is_read_twice_and_any_place_costs_the_same() -> None:
    times = []
    for start in (10, 10**9 - 40):
        data = Counting(10**9)
        loader = Accelerator(strategy="cpu", seed=0).prepare(DataLoader(data, batch_size=10, shuffle=True))
        loader.load_state_dict(loader.state_dict() | {"position": start})
        begin = time.perf_counter()
        next(iter(loader))
        times.append(time.perf_counter() - begin)
        assert data.read == permute(np.arange(start, start + 10), 10**9, 0, 0).tolist()
    assert max(times) < 0.1  # measured: below 2 ms


def test_a_billion_samples_start_within_a_megabyte() -> None:
    loader = Accelerator(strategy="cpu", seed=0).prepare(DataLoader(Numbers(10**9), batch_size=256, shuffle=True))
    next(iter(loader))
    tracemalloc.start()
    next(iter(loader))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_taken_is_what_the_loop_took_not_what_workers_read_ahead() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(100), batch_size=5, num_workers=2))
    for index, _ in enumerate(loader):
        assert loader.state_dict()["position"] == 5 * (index + 1)
        if index == 2:
            break
    assert loader.state_dict()["position"] == 15


def trained(num_batches: int, peeks: int) -> tuple[dict[str, Any], list[list[int]]]:
    accelerator = Accelerator(strategy="cpu", seed=2)
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(12), batch_size=2, shuffle=True))
    for _, batch in zip(range(num_batches), loader):  # noqa: B905  # stops before the end
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
    for _ in range(peeks):
        next(iter(loader))
    return loader.state_dict(), [batch.tolist() for batch in loader]


def test_a_look_is_no_position_where_something_is_trained() -> None:
    assert trained(0, 1)[0]["position"] == 0
    state, rest = trained(0, 0)
    other = Accelerator(strategy="cpu", seed=2).prepare(DataLoader(Numbers(12), batch_size=2, shuffle=True))
    for _ in range(2):
        other.load_state_dict({**state, "position": 4})
        for _ in range(3):
            assert next(iter(other)).tolist() == rest[2]
            assert other.epoch == 0
    assert [batch.tolist() for batch in other] == rest[2:]
    assert len(list(other)) == 6


def test_a_loop_left_by_break_and_entered_again_begins_the_next_epoch() -> None:
    accelerator = Accelerator(strategy="cpu", seed=2)
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(12), batch_size=2, shuffle=True))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
        break
    assert loader.state_dict() | {"epoch": 0, "position": 2} == loader.state_dict()
    assert sorted(flat([batch.tolist() for batch in loader])) == list(range(12))
    assert loader.state_dict()["epoch"] == 2


def test_two_loaders_keep_each_their_own_place() -> None:
    accelerator = Accelerator(strategy="cpu", seed=2)
    outer, inner = accelerator.prepare(DataLoader(Numbers(6), batch_size=2), DataLoader(Numbers(9), batch_size=3))
    for _ in outer:
        for _ in inner:
            break
        if outer.state_dict()["position"] == 4:
            break
    for left, right in zip(outer, inner):  # noqa: B905  # the shorter ends
        assert (left[0], right[0]) == (0, 0)
        break
    assert (outer.state_dict()["position"], inner.state_dict()["position"]) == (2, 3)
