"""Iterable datasets on several ranks and workers: every sample once, in step, continued anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info

from accelerator import Accelerator
from datasets_of_numbers import Plain, Stateful
from rank_pool import RankPool
from strategies import DataError


class Shuffled(Plain):
    """Draws its order from Python's generator."""

    def __iter__(self) -> Iterator[Tensor]:
        order = list(range(self.length))
        random.shuffle(order)
        return (torch.tensor(index) for index in order)


class Sharding(Plain):
    """Takes its part by torch's worker info, as torch's documentation shows."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(torch.arange(self.length)[first::step])


class StatefulIterator(Plain):
    """Its iterator says where it stands, as torchdata allows too."""

    def __iter__(self) -> Any:
        return Counter(self.length)


class Counter:
    def __init__(self, length: int) -> None:
        self.length, self.place = length, 0

    def __iter__(self) -> Counter:
        return self

    def __next__(self) -> Tensor:
        if self.place == self.length:
            raise StopIteration
        self.place += 1
        return torch.tensor(self.place - 1)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


KINDS = {kind.__name__: kind for kind in (Plain, Shuffled, Sharding, Stateful, StatefulIterator)}


def run(
    kind: str,
    length: int,
    batch: int,
    workers: int,
    state: dict[str, Any] | None,
    stop: int | None,
    epochs: int = 1,
    dispatch: bool = False,
) -> tuple[list[list[int]], dict[str, Any]]:
    accelerator = Accelerator(strategy="auto", seed=4, dispatch_batches=dispatch)
    context = "fork" if workers else None  # the pool's own, a fork server, imports torch anew for each worker
    loader = accelerator.prepare(
        DataLoader(KINDS[kind](length), batch_size=batch, num_workers=workers, multiprocessing_context=context)
    )
    if state is not None:
        loader.load_state_dict(state)
    taken: list[list[int]] = []
    for _ in range(epochs):
        for values in loader:
            taken.append(accelerator.gather_for_metrics(values).tolist())
            if len(taken) == stop:
                return taken, json.loads(json.dumps(loader.state_dict()))
    return taken, json.loads(json.dumps(loader.state_dict()))


def on(ranks: RankPool, nproc: int, *arguments: Any) -> Any:
    if nproc == 1:
        return run(*arguments)
    first, *others = ranks(run, *arguments, nproc=nproc)
    assert all(other == first for other in others)
    return first


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nproc", "workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_every_sample_once_on_any_number_of_ranks_and_workers(
    ranks: RankPool, kind: str, nproc: int, workers: int
) -> None:
    length = 1 if nproc == 3 else 11
    taken, state = on(ranks, nproc, kind, length, 2, workers, None, None, 2)
    assert sorted(flat(taken)) == sorted([*range(length), *range(length)])
    assert state["epoch"] == 2


def test_global_batches_hold_the_same_samples_on_any_number_of_ranks(ranks: RankPool) -> None:
    for kind in ("Plain", "Shuffled"):
        one, two = on(ranks, 1, kind, 17, 6, 0, None, None, 2)[0], on(ranks, 2, kind, 17, 3, 0, None, None, 2)[0]
        assert [set(batch) for batch in two] == [set(batch) for batch in one]
        assert one[:3] != one[3:] or kind == "Plain"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nproc", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_resumed_equals_never_stopped(ranks: RankPool, kind: str, nproc: int, workers: int) -> None:
    arguments = kind, 19, 2, workers
    whole, _ = on(ranks, nproc, *arguments, None, None, 2)
    for stop in (1, 3) if workers == 0 else (3,):
        before, state = on(ranks, nproc, *arguments, None, stop, 2)
        after, _ = on(ranks, nproc, *arguments, state, None, 2 - state["epoch"])
        # The order of workers that end at different times is torch's, and not always the same.
        assert (before, flat(after) if workers == 0 else sorted(flat(after))) == (
            whole[:stop],
            flat(whole[stop:]) if workers == 0 else sorted(flat(whole[stop:])),
        )


@pytest.mark.parametrize("kind", ["Plain", "Shuffled", "Stateful", "StatefulIterator"])
def test_another_number_of_ranks_and_workers_takes_the_rest(ranks: RankPool, kind: str) -> None:
    seen: list[int] = []
    state = None
    for nproc, workers, batch, stop in ((2, 0, 3, 2), (3, 0, 2, 1), (1, 2, 2, 3), (2, 0, 1, None)):
        taken, state = on(ranks, nproc, kind, 41, batch, workers, state, stop)
        seen += flat(taken)
    assert sorted(seen) == list(range(41))


def test_a_dataset_with_a_state_reads_nothing_twice() -> None:
    data = Stateful(20)
    loader = Accelerator(strategy="cpu").prepare(DataLoader(data, batch_size=2))
    state: dict[str, Any] = {}
    for index, _ in enumerate(loader):
        if index == 3:
            state = loader.state_dict()
            break
    again = Stateful(20)
    other = Accelerator(strategy="cpu").prepare(DataLoader(again, batch_size=2))
    other.load_state_dict(state)
    assert flat([batch.tolist() for batch in other]) == list(range(8, 20))
    assert again.num_read == 12


def test_what_the_dataset_makes_itself_needs_the_same_number_of_parts(ranks: RankPool) -> None:
    _, state = on(ranks, 2, "Sharding", 20, 2, 0, None, 2)
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Sharding(20), batch_size=2))
    with pytest.raises(DataError, match=r"read in 2 parts \(ranks times workers\), which the dataset makes itself"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("length", [1, 12, 13])
def test_rank_0_may_read_for_all(ranks: RankPool, length: int) -> None:
    taken, _ = on(ranks, 3, "Plain", length, 2, 0, None, None, 1, True)
    assert flat(taken) == list(range(length))
    before, state = on(ranks, 3, "Plain", length, 2, 0, None, 1, 1, True)
    assert state["num_shards"] == 1
    after, _ = on(ranks, 2, "Plain", length, 2, 0, state, None, 1, True)
    assert flat(before) + flat(after) == list(range(length))


class Ragged(Plain):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((1 + index % 3, 2), index) for index in range(self.length))


def ragged() -> list[Any]:
    accelerator = Accelerator(strategy="ddp", dispatch_batches=True)
    loader = accelerator.prepare(DataLoader(Ragged(7), batch_size=None))
    return [accelerator.gather_for_metrics(batch)[:, 0].tolist() for batch in loader]


def test_dispatched_batches_may_have_any_shape(ranks: RankPool) -> None:
    assert ranks(ragged) == [[[0, 1, 1], [2, 2, 2, 3], [4, 4, 5, 5, 5], [6]]] * 2


class Failing(Plain):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.length):
            if index == 5:
                raise ValueError(f"record {index} is damaged")
            yield torch.tensor(index)


def read_failing(dispatch: bool) -> None:
    accelerator = Accelerator(strategy="ddp", dispatch_batches=dispatch)
    for _ in accelerator.prepare(DataLoader(Failing(12), batch_size=2)):
        pass


def test_an_exception_of_the_reading_rank_reaches_all(ranks: RankPool) -> None:
    first, second = ranks(read_failing, True, return_exceptions=True)
    assert isinstance(first, ValueError)
    assert isinstance(second, DataError)
    assert "rank 0, which reads for all: ValueError: record 5 is damaged" in str(second)


class FailingOnOne(Plain):
    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        for index in range(self.length):
            if index == 3 and info is not None and info.id == 1:
                raise ValueError(f"record {index} is damaged")
            yield torch.tensor(index)


def read_failing_on_one() -> None:
    accelerator = Accelerator(strategy="ddp")
    for _ in accelerator.prepare(DataLoader(FailingOnOne(12), batch_size=2)):
        pass


def test_an_exception_on_one_rank_reaches_all(ranks: RankPool) -> None:
    first, second = ranks(read_failing_on_one, return_exceptions=True)
    assert isinstance(second, ValueError), second
    assert isinstance(first, DataError), first
    assert "this one cannot go on alone: rank 1: ValueError: record 3 is damaged" in str(first)


def train(kind: str, dispatch: bool) -> list[float]:
    accelerator = Accelerator(strategy="ddp", gradient_accumulation_steps=2, dispatch_batches=dispatch)
    torch.manual_seed(0)
    model = nn.Linear(1, 1, dtype=torch.float64)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), DataLoader(KINDS[kind](17), batch_size=2)
    )
    path = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(batch.double().reshape(-1, 1)) - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            path.append(accelerator.unwrap_model(model).weight.item())
    return path


@pytest.mark.parametrize("dispatch", [False, True])
def test_gradients_are_those_of_one_process(ranks: RankPool, dispatch: bool) -> None:
    """17 samples over two ranks in batches of 2: windows of 8, 8 and 1, in which one rank has a ghost."""
    paths = ranks(train, "Plain", dispatch)
    torch.manual_seed(0)
    plain = nn.Linear(1, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    expected = []
    for window in torch.arange(17.0, dtype=torch.float64).reshape(-1, 1).split(8):
        optimizer.zero_grad()
        (plain(window) - 1).square().mean().backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        expected.append(plain.weight.item())
    for path in paths:
        assert path == pytest.approx(expected, rel=1e-9)


def test_the_loops_generators_are_left_alone(ranks: RankPool) -> None:
    assert ranks(drawn_beside) == [True, True]


def drawn_beside() -> bool:
    accelerator = Accelerator(strategy="ddp")
    loader = accelerator.prepare(DataLoader(Shuffled(8), batch_size=2))
    state = random.getstate()
    list(loader)
    return random.getstate() == state


def test_explain_says_how_a_stream_is_resumed() -> None:
    accelerator = Accelerator(strategy="cpu")
    accelerator.prepare(DataLoader(Plain(3)), DataLoader(Stateful(3)))
    assert "by reading up to where it was" in accelerator.explain()["loader 0"].got
    assert "resumed by its own state" in accelerator.explain()["loader 1"].got


def test_persistent_workers_resume_and_go_on_with_whole_epochs() -> None:
    def loader() -> Any:
        plain = DataLoader(Plain(16), batch_size=2, num_workers=2, persistent_workers=True)
        return Accelerator(strategy="cpu").prepare(plain)

    first = loader()
    whole = [batch.tolist() for _ in range(2) for batch in first]
    second = loader()
    for index, _ in enumerate(second):
        if index == 2:
            break
    third = loader()
    third.load_state_dict(second.state_dict())
    next(iter(third))  # a look
    assert [batch.tolist() for _ in range(2) for batch in third] == whole[3:]
