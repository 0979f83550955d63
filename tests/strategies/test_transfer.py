"""Batches on their way to the loop: the same ones, and exceptions in their place. tests/gpu tests the overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from strategies.transfer import one_ahead, to_device, unrecorded


def numbers(length: int, read: list[int], fails_at: int | None = None) -> Iterator[int]:
    for number in range(length):
        if number == fails_at:
            raise LookupError(number)
        read.append(number)
        yield number


@pytest.mark.parametrize("length", [0, 1, 4])
def test_the_next_item_is_taken_before_one_is_given_out(length: int) -> None:
    read: list[int] = []
    for number in one_ahead(numbers(length, read)):
        assert len(read) == min(number + 2, length)
    assert read == list(range(length))


def test_an_exception_comes_in_its_place() -> None:
    items = one_ahead(numbers(4, [], fails_at=2))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(LookupError):
        next(items)


def test_nothing_is_added_on_a_cpu() -> None:
    batches = iter([torch.zeros(1)])
    assert to_device(batches, torch.device("cpu")) is batches


class Failing(Sequence[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise LookupError(index)
        return index


def test_the_range_for_a_profiler_is_opened_while_one_runs() -> None:
    loader = DataLoader([1, 2, 3, 4, 5], batch_size=2)
    batches = unrecorded(iter(loader))
    found = [next(batches)]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found.append(next(batches))
    found.extend(batches)
    assert [batch.tolist() for batch in found] == [[1, 2], [3, 4], [5]]
    assert sum("DataLoaderIter.__next__" in event.name for event in seen.events()) == 1


def test_batches_of_workers_and_of_other_iterators_are_left_alone() -> None:
    other = iter([torch.zeros(1)])
    assert unrecorded(other) is other
    of_workers = iter(DataLoader([1, 2], num_workers=1))
    assert unrecorded(of_workers) is of_workers


def test_an_exception_of_the_dataset_passes_through() -> None:
    batches = unrecorded(iter(DataLoader(Failing())))
    assert [next(batches).item(), next(batches).item()] == [0, 1]
    with pytest.raises(LookupError, match="2"):
        next(batches)
