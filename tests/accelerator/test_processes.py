"""Shares of inputs, and random numbers, of each rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerator.processes import seed_apart, seed_everything, split
from strategies import ConfigurationError, World

KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "tensor": torch.tensor, "array": np.array}


def shares(inputs: Any, world_size: int, apply_padding: bool) -> list[Any]:
    found = []
    for rank in range(world_size):
        with split(inputs, World(rank=rank, size=world_size), apply_padding=apply_padding) as share:
            found.append(share)
    return found


@settings(max_examples=150)
@given(length=st.integers(0, 20), world_size=st.integers(1, 6), padded=st.booleans(), kind=st.sampled_from(list(KINDS)))
def test_shares_are_contiguous_even_and_complete(length: int, world_size: int, padded: bool, kind: str) -> None:
    inputs = KINDS[kind](list(range(length)))
    parts = shares(inputs, world_size, padded)
    assert all(type(part) is type(inputs) for part in parts)
    lists = [list(map(int, part)) for part in parts]
    whole = [item for part in lists for item in part]
    lengths = [len(part) for part in lists]
    if padded and length:
        assert len(set(lengths)) == 1
        assert [lists[rank][: len(part)] for rank, part in enumerate(np.array_split(range(length), world_size))] == [
            part.tolist() for part in np.array_split(range(length), world_size)
        ]
        assert all(item == length - 1 for part in lists for item in part[len(set(part)) :])
        assert sorted(set(whole)) == list(range(length))
    else:
        assert lists == [part.tolist() for part in np.array_split(range(length), world_size)]


def test_a_mapping_is_split_value_by_value() -> None:
    inputs = {"words": ["a", "b", "c"], "numbers": torch.arange(3)}
    first, second = shares(inputs, 2, True)
    assert (first["words"], first["numbers"].tolist()) == (["a", "b"], [0, 1])
    assert (second["words"], second["numbers"].tolist()) == (["c", "c"], [2, 2])


def test_values_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"values of different lengths: \{'a': 1, 'b': 2\}"):
        shares({"a": [1], "b": [1, 2]}, 2, False)


@pytest.mark.parametrize("inputs", ["text", 3, {1, 2}])
def test_what_cannot_be_split_is_named(inputs: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"split_between_processes got {type(inputs).__name__} .*; expected a"):
        shares(inputs, 2, False)


def test_a_range_is_split() -> None:
    assert [list(share) for share in shares(range(5), 2, True)] == [[0, 1, 2], [3, 4, 4]]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


@pytest.fixture(autouse=True)
def generators() -> Any:
    python, numpy = random.getstate(), np.random.get_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63 - 1])
def test_a_seed_decides_every_generator(seed: int) -> None:
    drawn = []
    for value in (seed, seed, seed + 1):
        seed_everything(value)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True) if seed)


def test_ranks_draw_apart_and_the_first_one_as_a_single_process() -> None:
    drawn = []
    for rank in range(3):
        seed_everything(5)
        seed_apart(5, World(rank=rank, size=3))
        drawn.append(draw())
    seed_everything(5)
    assert drawn[0] == draw()
    assert len(set(drawn)) == 3
