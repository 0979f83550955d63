"""Where a loop stands in its data: stopped anywhere, continued on anything, every sample comes once and in order."""

from __future__ import annotations

import collections
import itertools
import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from strategies import CPU, Precision, World
from strategies.accumulation import Accumulation
from strategies.prepared import DataOptions
from strategies.prepared.agreement import Seed
from strategies.prepared.dataloader import prepare_dataloader
from strategies.sharding import permute


def whole_order(length: int, shuffle: bool, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(length), length, seed, epoch).tolist() if shuffle else list(range(length))


def simulated(loader: DataLoader[Any], rank: int, size: int, seed: int) -> Any:
    """What `prepare` returns on one of several ranks, without the others: for the order they need not communicate."""
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    accumulation = Accumulation(CPU(), world, Precision("no"), lambda cursor: 1)
    return prepare_dataloader(loader, accumulation, options=DataOptions(), seed=Seed(seed, was_given=True))


class Stage(NamedTuple):
    """A part of a run: ranks, samples per rank and batch, batches read ahead, and after how many batches it stops."""

    world_size: int
    batch_size: int
    drop_last: bool
    ahead: int
    stop: int


STAGES = st.lists(
    st.builds(Stage, st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 6), st.integers(0, 12)),
    min_size=1,
    max_size=5,
)


def expected_batch(whole: list[int], position: int, stage: Stage) -> list[int]:
    """The next global batch of an epoch that stands at `position`; none at its end."""
    batch = whole[position : position + stage.world_size * stage.batch_size]
    return [] if stage.drop_last and len(batch) < stage.world_size * stage.batch_size else batch


@settings(max_examples=300)
@given(length=st.integers(1, 200), shuffle=st.booleans(), epoch=st.integers(0, 3), stages=STAGES)
def test_stages_of_any_world_and_batch_take_the_epoch_in_its_order(
    length: int, shuffle: bool, epoch: int, stages: list[Stage]
) -> None:
    """The order of every global batch included, on worlds that change with every stop, once through JSON each time.

    Ranks are simulated one after the other in this process. Reading ahead is what workers do: torch asks the sampler
    for that many batches more than the loop takes.
    """
    whole, taken, state = whole_order(length, shuffle, 9, epoch), list[int](), None
    for stage in [*stages, Stage(world_size=2, batch_size=3, drop_last=False, ahead=1, stop=length)]:
        if stage.drop_last and length < stage.world_size * stage.batch_size:
            continue  # refused: no batch at all
        options = {"batch_size": stage.batch_size, "shuffle": shuffle, "drop_last": stage.drop_last}
        loaders = [
            simulated(DataLoader(Numbers(length), **options), rank, stage.world_size, 9)
            for rank in range(stage.world_size)
        ]
        state = loaders[0].state_dict() | {"epoch": epoch} if state is None else json.loads(json.dumps(state))
        for loader in loaders:
            loader.load_state_dict(state)
        passes = [reading_ahead(loader, stage.ahead) for loader in loaders]
        for _ in range(stage.stop):
            expected = expected_batch(whole, len(taken), stage)
            parts = [next(one, None) for one in passes]
            if not expected:
                assert parts == [None] * stage.world_size
                break
            shares = np.array_split(expected, stage.world_size)  # contiguous, the first ones longer by one
            assert parts == [share.tolist() or expected[:1] for share in shares]
            taken += expected
        for one in passes:
            one.close()
        states = [loader.state_dict() for loader in loaders]
        assert states == [states[0]] * stage.world_size
        state = states[0]
        if state["epoch"] > epoch:
            break
        assert state["position"] == len(taken)
    assert taken == whole[: len(taken)]
    assert len(taken) == length or (state["epoch"] > epoch and not expected_batch(whole, len(taken), stage))


def reading_ahead(loader: Any, ahead: int) -> Iterator[list[int]]:
    """The batches of a pass over `loader` whose sampler is asked for `ahead` batches more than are given out."""
    own_sampler = loader.batch_sampler
    loader.__dict__["batch_sampler"] = Ahead(own_sampler, ahead)
    for batch in loader:
        yield batch.tolist()


class Ahead:
    def __init__(self, sampler: Any, ahead: int) -> None:
        self.sampler, self.ahead = sampler, ahead

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        rest = iter(self.sampler)
        read = collections.deque(itertools.islice(rest, self.ahead))
        for batch in rest:
            read.append(batch)
            yield read.popleft()
        yield from read


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


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes long
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
    if kind in ("buckets", "batched"):  # the batches are those of the batch sampler, which is the same in both
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
