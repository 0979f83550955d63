"""Accumulation steps derived from a global batch size, against trying every number of steps."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from accelerator.batch_arithmetic import BatchArithmetic
from accelerator.config import Resolved, resolve_settings
from rank_pool import RankPool
from strategies import ConfigurationError, World


def resolved(code: dict[str, object], environ: dict[str, str]) -> Resolved:
    return resolve_settings(code, environ=environ, directory=Path(__file__).parent)


def arithmetic(wanted: int | None, *sizes: int | None, world_size: int = 1) -> BatchArithmetic:
    code: dict[str, object] = {} if wanted is None else {"global_batch_size": wanted}
    derived = BatchArithmetic(resolved(code, environ={}), World(size=world_size))
    loaders: list[Any] = [SimpleNamespace(global_batch_size=size) for size in sizes]
    derived.add(loaders)
    return derived


@settings(max_examples=200)
@given(wanted=st.integers(1, 200), batch=st.integers(1, 30))
def test_steps_times_batch_is_what_was_asked_or_the_nearest_are_named(wanted: int, batch: int) -> None:
    fitting = [steps * batch for steps in range(1, wanted + 2)]
    if wanted in fitting:
        assert arithmetic(wanted, batch).steps * batch == wanted
        return
    with pytest.raises(ConfigurationError, match=f"global_batch_size is {wanted}") as caught:
        arithmetic(wanted, batch)
    named = re.search(r"The nearest that fit: ([\d or]+)\.", str(caught.value))
    assert named
    below, above = [fit for fit in fitting if fit < wanted][-1:], [fit for fit in fitting if fit > wanted][:1]
    assert [int(number) for number in named[1].split(" or ")] == below + above


def test_one_loader_that_divides_is_enough() -> None:
    assert arithmetic(12, 5, 4).steps == 3
    assert arithmetic(12, None, 6).steps == 2


def test_without_a_loader_there_is_nothing_to_derive_from() -> None:
    with pytest.raises(ConfigurationError, match=r"global_batch_size is 8 \(code\), but no dataloader was prepared"):
        _ = arithmetic(8).steps


def test_a_loader_without_a_batch_size_is_named() -> None:
    with pytest.raises(ConfigurationError, match="the loader has no batch_size to divide it by"):
        arithmetic(8, None)


def count_steps(batch_size: int, split_batches: bool) -> tuple[int, int]:
    accelerator = Accelerator(strategy="ddp", global_batch_size=8, split_batches=split_batches)
    data = TensorDataset(torch.ones(16, 1))
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(data, batch_size=batch_size))
    closed = 0
    for (batch,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())
            closed += accelerator.sync_gradients
    return accelerator.gradient_accumulation_steps, closed


@pytest.mark.parametrize(("batch_size", "split_batches", "steps"), [(2, False, 2), (2, True, 4), (4, False, 1)])
def test_a_global_batch_spans_ranks_and_micro_batches(
    ranks: RankPool, batch_size: int, split_batches: bool, steps: int
) -> None:
    assert ranks(count_steps, batch_size, split_batches) == [(steps, 2)] * 2


def test_the_loader_that_is_trained_on_is_checked_again() -> None:
    accelerator = Accelerator(strategy="cpu", global_batch_size=8)
    data = TensorDataset(torch.ones(9, 1))
    model, _, odd = accelerator.prepare(nn.Linear(1, 1), DataLoader(data, batch_size=4), DataLoader(data, batch_size=3))
    next(batches := iter(odd))
    with pytest.raises(ConfigurationError, match="expected a multiple of 3"):
        accelerator.accumulate(model).__enter__()
    batches.close()  # type: ignore[attr-defined]  # a generator
