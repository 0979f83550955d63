"""The order of an epoch and how it is cut, against brute force over every sample."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strategies.sharding import ComputedOrder, Cut, ShardedBatchSampler, permute


def order(length: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(length), length, seed, epoch)


def deviations(counts: np.ndarray, freedom: int) -> float:
    """How many standard deviations the chi-square statistic of equally likely `counts` lies above its mean."""
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def test_the_order_is_a_bijection_for_every_short_length() -> None:
    for length in range(1, 2001):
        assert np.array_equal(np.sort(order(length, seed=length % 7, epoch=length % 3)), np.arange(length)), length


@settings(max_examples=60)
@given(length=st.integers(2001, 3 * 10**5), seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10**6))
@example(length=2**17, seed=0, epoch=0)
@example(length=2**17 + 1, seed=0, epoch=0)
@example(length=2**18, seed=0, epoch=0)
@example(length=2**18 + 1, seed=0, epoch=0)
def test_the_order_is_a_bijection_for_long_lengths(length: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.bincount(order(length, seed, epoch), minlength=length), np.ones(length))


def hashed(value: int, key: int, bits: int) -> int:
    value = (value + key) * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 32) * 0xBF58476D1CE4E5B9 % 2**64
    return value >> (64 - bits)


def splitmix(state: int, number: int) -> Any:
    """`number` outputs of SplitMix64 from `state` on; with 0, the state itself, mixed."""

    def mixed(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    start = mixed(state % 2**64)
    return [mixed((start + k * 0x9E3779B97F4A7C15) % 2**64) for k in range(1, number + 1)] if number else start


def position_of(index: int, length: int, seed: int, epoch: int) -> int:
    """Where a shuffled epoch has `index`: the network of `permute` run backwards, in Python's integers."""
    keys = splitmix(splitmix(seed, 0) + epoch, 6)
    bits = (length - 1).bit_length()
    found, few = length, bits // 2
    while found >= length:
        left, right = index >> few, index % 2**few
        for second, first in zip(keys[::-2], keys[-2::-2], strict=True):
            right ^= hashed(left, second, few)
            left ^= hashed(right, first, bits - few)
        found = index = left << few | right
    return found


@settings(max_examples=60)
@given(length=st.integers(2**17 + 1, 10**12), epoch=st.integers(0, 99), data=st.data())
@example(length=10**12, epoch=0, data=None)
@example(length=2**40, epoch=1, data=None)
@example(length=2**38 + 1, epoch=1, data=None)
def test_a_position_of_any_length_is_found_alone_and_back(length: int, epoch: int, data: st.DataObject | None) -> None:
    """What can be found back from where it went is a bijection."""
    places = st.lists(st.integers(0, length - 1), min_size=1, max_size=5)
    positions = np.array(data.draw(places) if data is not None else [0, 1, length // 2, length - 1])
    found = permute(positions, length, 3, epoch)
    assert found.min() >= 0
    assert found.max() < length
    assert [position_of(index, length, 3, epoch) for index in found.tolist()] == positions.tolist()
    assert [permute(position[None], length, 3, epoch).item() for position in positions] == found.tolist()


def test_the_shape_of_positions_is_kept() -> None:
    assert np.array_equal(permute(np.arange(12).reshape(3, 4), 12, 0, 0), order(12).reshape(3, 4))


def test_a_billion_samples_start_at_once() -> None:
    start = time.perf_counter()
    permute(np.arange(1000), 10**9, 0, 0)
    assert time.perf_counter() - start < 1


def test_orders_of_epochs_and_seeds_have_nothing_in_common() -> None:
    orders = [order(5000, seed, epoch) for seed in range(5) for epoch in range(5)]
    for first in range(len(orders)):
        for second in range(first):
            agreeing = int((orders[first] == orders[second]).sum())  # Poisson of mean 1
            assert agreeing < 10
            assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 5 / math.sqrt(5000)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 13])
def test_every_sample_is_equally_often_at_every_place(length: int) -> None:
    orders = np.stack([order(length, 0, epoch) for epoch in range(1500)])
    counts = np.stack([np.bincount(column, minlength=length) for column in orders.T])  # (place, sample)
    assert deviations(counts, (length - 1) ** 2) < 5


@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_permutation_of_a_few_samples_is_equally_frequent(length: int) -> None:
    codes = [int("".join(map(str, order(length, 1, epoch))), length) for epoch in range(1500)]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.factorial(length)
    assert deviations(counts, len(counts) - 1) < 5


# Sorted by random keys; through the network, with cycle walking and without; where only a part of it is looked at.
LENGTHS = [1000, 5000, 2**17 + 1, 200_000, 2**18, 10**9]


def beginnings(length: int, seed: int, epochs: int) -> np.ndarray:
    """(epoch, position): in which of 16 equal parts of the data the first samples of each epoch lie."""
    positions = np.arange(min(length, 40_000))
    return np.stack([permute(positions, length, seed, epoch) for epoch in range(epochs)]) * 16 // length


def chi_square_of_pairs(first: np.ndarray, second: np.ndarray, expected: int) -> float:
    """In standard deviations: how far pairs of two numbers below 16 are from equally frequent."""
    counts = np.bincount(first.ravel() * 16 + second.ravel(), minlength=256)
    assert counts.mean() >= expected
    return deviations(counts, 255)


@pytest.mark.parametrize("length", LENGTHS)
def test_where_a_sample_lies_does_not_tell_its_place(length: int) -> None:
    parts = beginnings(length, 5, 20)
    places = np.broadcast_to(np.arange(parts.shape[1]) * 16 // parts.shape[1], parts.shape)
    assert chi_square_of_pairs(places, parts, 70) < 5
    single_bits = np.broadcast_to(np.arange(parts.shape[1]) % 16, parts.shape)
    assert chi_square_of_pairs(single_bits, parts, 70) < 5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_what_follows_a_sample_does_not_depend_on_it(length: int, distance: int) -> None:
    parts = beginnings(length, 5, 20)
    assert chi_square_of_pairs(parts[:, :-distance], parts[:, distance:], 70) < 5


@pytest.mark.parametrize("length", LENGTHS)
def test_one_epoch_tells_nothing_of_another(length: int) -> None:
    parts = beginnings(length, 5, 20)
    assert chi_square_of_pairs(parts[:-1], parts[1:], 70) < 5
    assert chi_square_of_pairs(parts, beginnings(length, 6, 20), 70) < 5


CUTS = st.builds(
    Cut,
    length=st.integers(1, 400),
    global_batch=st.integers(1, 64),
    world_size=st.integers(1, 9),
    drop_last=st.booleans(),
)


@settings(max_examples=300)
@given(cut=CUTS)
def test_slices_cover_every_global_batch_once_contiguously_and_evenly(cut: Cut) -> None:
    batches = [range(cut.length)[i : i + cut.global_batch] for i in range(0, cut.length, cut.global_batch)]
    if cut.drop_last and len(batches[-1]) < cut.global_batch:
        batches.pop()
    assert cut.num_batches == len(batches)
    for index, batch in enumerate(batches):
        slices = [range(*cut.bounds(index, rank)) for rank in range(cut.world_size)]
        assert [position for part in slices for position in part] == list(batch)
        lengths = [len(part) for part in slices]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)
        assert lengths == [cut.local_samples(index, rank) for rank in range(cut.world_size)]
        assert cut.samples(index) == len(batch)


@settings(max_examples=300)
@given(cut=CUTS, num_batches=st.integers(1, 12), data=st.data())
def test_samples_of_a_window_are_counted_as_far_as_the_epoch_goes(
    cut: Cut, num_batches: int, data: st.DataObject
) -> None:
    if cut.num_batches == 0:
        return
    first = data.draw(st.integers(0, cut.num_batches - 1))
    inside = range(first, min(first + num_batches, cut.num_batches))
    assert cut.window_samples(first, num_batches) == sum(cut.samples(batch) for batch in inside)


@settings(max_examples=100)
@given(
    length=st.integers(1, 300),
    per_rank=st.integers(1, 9),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_together_take_the_epoch_in_its_order(
    length: int, per_rank: int, world_size: int, drop_last: bool, shuffle: bool, epoch: int
) -> None:
    cut = Cut(length=length, global_batch=per_rank * world_size, world_size=world_size, drop_last=drop_last)
    samplers = [ShardedBatchSampler(cut, rank, ComputedOrder(length, 9, shuffle=shuffle)) for rank in range(world_size)]
    for sampler in samplers:
        sampler.begin(epoch, 0)
    taken = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in taken} == {len(sampler) for sampler in samplers} == {cut.num_batches}
    whole = order(length, 9, epoch).tolist() if shuffle else list(range(length))
    flat = []
    for index, parts in enumerate(zip(*taken, strict=True)):
        for rank, part in enumerate(parts):
            if cut.local_samples(index, rank):
                flat += part
            else:
                assert part == [whole[index * cut.global_batch]]  # a ghost
    assert flat == (whole[: cut.num_batches * cut.global_batch] if drop_last else whole)


def test_blocks_of_indices_leave_no_seam() -> None:
    cut = Cut(length=140_001, global_batch=7, world_size=2, drop_last=False)
    first, second = (list(ShardedBatchSampler(cut, rank, ComputedOrder(140_001, 1, shuffle=True))) for rank in range(2))
    parts = zip(first[:-1], second[:-1], strict=True)
    assert [index for pair in parts for part in pair for index in part] == order(140_001, seed=1)[: 7 * 20_000].tolist()
