"""Reading one ahead: the same items, and exceptions in their place. The overlap itself is tested in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from strategies.transfer import one_ahead, to_device


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
