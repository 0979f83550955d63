"""Positions that do not fit a loader are refused with what was saved and what is here, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers, Stream
from rank_pool import RankPool
from sampled_loaders import Shuffles
from strategies import DataError


def state_of(length: int = 10, seed: int = 0, **options: Any) -> dict[str, Any]:
    options = options or {"shuffle": True}
    state: dict[str, Any] = (
        Accelerator(strategy="cpu", seed=seed).prepare(DataLoader(Numbers(length), **options)).state_dict()
    )
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: state_of(length=11), "saved when Numbers gave 11 samples or batches, and it gives 10 now"),
        (lambda: state_of(seed=5), "saved with seed 5, and the loader has 0"),
        (
            lambda: state_of(shuffle=False),
            "saved with the order 'sequential', and the loader over Numbers has 'shuffled'",
        ),
        (lambda: state_of(sampler=Shuffles(10)), "saved with the order 'Shuffles'"),
        (lambda: state_of() | {"position": 11}, "is 11, after the end of an epoch of 10"),
        (lambda: state_of() | {"position": "3"}, "position in the position to load is '3'; expected an integer >= 0"),
        (lambda: {name: value for name, value in state_of().items() if name != "seed"}, "saved with seed None"),
        (lambda: state_of() | {"version": 99}, "version 99; this release reads up to 1"),
        (lambda: {"epoch": 1}, "load_state_dict got dict .*expected what state_dict"),
        (lambda: None, "load_state_dict got NoneType None"),
    ],
)
def test_a_position_that_does_not_fit_is_refused(state: Any, message: str) -> None:
    loader = Accelerator(strategy="cpu", seed=0).prepare(DataLoader(Numbers(10), shuffle=True))
    given_state = state()
    before = loader.state_dict()
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(given_state)
    assert loader.state_dict() == before


def test_a_seed_that_nobody_chose_is_taken_from_the_position() -> None:
    torch.manual_seed(1)
    first = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(10), batch_size=2, shuffle=True))
    batches = [batch.tolist() for batch in first]
    state = first.state_dict() | {"epoch": 0, "position": 4}
    torch.manual_seed(2)
    second = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(10), batch_size=2, shuffle=True))
    second.load_state_dict(state)
    assert [batch.tolist() for batch in second] == batches[2:]


@pytest.mark.parametrize("seed", [None, "0", True])
def test_a_seed_that_is_no_number_is_refused(seed: Any) -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(10), shuffle=True))
    with pytest.raises(DataError, match=f"seed in the position to load is {seed!r}; expected an integer"):
        loader.load_state_dict(state_of() | {"seed": seed})


def test_a_position_in_a_stream_without_its_parts_is_refused() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Stream(10)))
    with pytest.raises(DataError, match="the position to load lacks given, layers, num_shards"):
        loader.load_state_dict({"version": 1, "order": "stream", "epoch": 0})


def test_loading_inside_a_loop_is_refused() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(10), batch_size=2))
    for _ in loader:
        with pytest.raises(DataError, match="called inside a loop over the loader"):
            loader.load_state_dict(loader.state_dict())
        break


def loaded_apart() -> None:
    accelerator = Accelerator(strategy="ddp", seed=0)
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(20), batch_size=2, shuffle=True))
    if accelerator.is_main_process:
        loader.load_state_dict(loader.state_dict() | {"position": 4})
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())


def test_ranks_that_loaded_different_positions_are_told(ranks: RankPool) -> None:
    for error in ranks(loaded_apart, return_exceptions=True):
        assert isinstance(error, DataError), error
        assert "rank 0: epoch 0, batch 0 after position 4; rank 1: epoch 0, batch 0)" in str(error)
