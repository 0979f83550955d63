"""Iterable datasets that ask which part they are, split themselves without asking, or do so by rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from accelerator import Accelerator
from datasets_of_numbers import Plain
from rank_pool import RankPool
from strategies import DataError


class Counted(Plain):
    """Its `worker_init_fn` splits it by the argument, as torch's documentation shows."""

    first = 0

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.first, self.length))


def split(worker: int) -> None:
    info: Any = get_worker_info()
    each = -(-info.dataset.length // info.num_workers)
    info.dataset.first, info.dataset.length = worker * each, min((worker + 1) * each, info.dataset.length)


class Named(Plain):
    """Asks which worker it is in for a name only."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        assert f"worker {0 if info is None else info.id}"
        return super().__iter__()


def read_by(kind: str, workers: int) -> list[int]:
    accelerator = Accelerator(strategy="auto", seed=4)
    own: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    if kind == "split by its argument":
        own["worker_init_fn"] = split
    data = {"split by its argument": Counted, "named": Named, "by rank": ByRank}[kind](24)
    loader = accelerator.prepare(DataLoader(data, batch_size=2, num_workers=workers, **own))
    return sorted(sample for batch in loader for sample in accelerator.gather_for_metrics(batch).tolist())


@pytest.mark.parametrize(("kind", "workers"), [("split by its argument", 2), ("named", 0), ("named", 2)])
def test_what_is_asked_in_a_worker_counts_ranks_too(ranks: RankPool, kind: str, workers: int) -> None:
    assert ranks(read_by, kind, workers) == [list(range(24))] * 2


class ByRank(Plain):
    """Splits by rank itself, which would leave each rank half of its half."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(dist.get_rank(), self.length, dist.get_world_size()))


def warned() -> None:
    with pytest.warns(UserWarning, match=r"parts \(ranks times workers\) of ByRank begin with different samples"):
        read_by("by rank", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_by("named", 2)


def test_a_stream_that_splits_by_rank_itself_is_warned_of(ranks: RankPool) -> None:
    ranks(warned)


class ById(Plain):
    """Takes the part of its number, without asking how many parts there are."""

    def __iter__(self) -> Iterator[Tensor]:
        info: Any = get_worker_info()
        return iter(torch.arange(info.id * 4, info.id * 4 + 4))


class ByIdOfSome(ById):
    """Asks how many there are, too: it is taken to split itself."""

    def __iter__(self) -> Iterator[Tensor]:
        assert get_worker_info().num_workers  # type: ignore[union-attr]
        return super().__iter__()


def split_alone(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.first, info.dataset.length = worker * 12, worker * 12 + 12


def read_parts(data: Plain, workers: int, **own: Any) -> list[int]:
    own |= {"multiprocessing_context": "fork"} if workers else {}
    accelerator = Accelerator(strategy="auto")
    loader = accelerator.prepare(DataLoader(data, 2, num_workers=workers, **own))
    return sorted(sample for batch in loader for sample in batch.tolist())


def refused(workers: int) -> str:
    with pytest.raises(DataError) as raised:
        read_parts(ById(8), workers)
    return str(raised.value)


@pytest.mark.parametrize(("nproc", "workers"), [(1, 2), (2, 0), (2, 2)])
def test_a_stream_that_splits_by_its_number_alone_is_refused(ranks: RankPool, nproc: int, workers: int) -> None:
    for message in ranks(refused, workers, nproc=nproc):
        assert "of ById begin with different samples, and it asked which part it is" in message
        assert "num_workers" in message
    parts = ranks(read_parts, ByIdOfSome(8), workers, nproc=nproc)
    assert sorted(sample for part in parts for sample in part) == list(range(4 * nproc * max(1, workers)))


def test_workers_that_split_by_the_argument_alone_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="of Counted begin with different samples"):
        read_parts(Counted(24), 2, worker_init_fn=split_alone)


class Augmented(Plain):
    """Draws from a generator of its own, which differs from worker to worker."""

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator()
        generator.seed()
        return (sample + torch.rand((), generator=generator) / 2 for sample in super().__iter__())


def test_workers_that_draw_apart_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="of Augmented begin with different samples"):
        assert [int(sample) for sample in read_parts(Augmented(24), 2)] == list(range(24))
