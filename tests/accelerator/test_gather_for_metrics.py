"""What the facade gathers: every sample once, in order, also in nested loops and of any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import (
    DataError,
    ShapeMismatchError,
)


def numbers(length: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(length)), batch_size=batch_size)


def metrics(length: int, batch_size: int) -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    loader = accelerator.prepare(numbers(length, batch_size))
    seen: dict[str, list[Any]] = {"tensor": [], "words": [], "long": [], "scalar": [], "pair": []}
    for (batch,) in loader:
        seen["tensor"] += accelerator.gather_for_metrics(batch).tolist()
        seen["words"] += accelerator.gather_for_metrics([str(int(number)) for number in batch])
        seen["long"] += accelerator.gather_for_metrics(batch.repeat_interleave(3)).tolist()
        seen["scalar"] += accelerator.gather_for_metrics(batch.float().mean()).tolist()
        pair = accelerator.gather_for_metrics({"inputs": batch, "labels": (batch * 2, None)})
        seen["pair"] += (pair["inputs"] + pair["labels"][0]).tolist()
    return list(seen.values())


@settings(max_examples=20)
@given(length=st.integers(1, 30), batch_size=st.integers(1, 5), nproc=st.integers(1, 3))
def test_what_is_gathered_is_the_dataset_once(ranks: RankPool, length: int, batch_size: int, nproc: int) -> None:
    means = []
    for start in range(0, length, batch_size * nproc):
        batch = torch.arange(start, min(start + batch_size * nproc, length), dtype=torch.float32)
        means += [part.mean().item() for part in batch.tensor_split(nproc) if len(part)]
    everything = list(range(length))
    expected = [
        everything,
        [str(number) for number in everything],
        [number for number in everything for _ in range(3)],
        means,
        [3 * number for number in everything],
    ]
    assert ranks(metrics, length, batch_size, nproc=nproc) == [expected] * nproc


def nested_loops(outer_length: int, inner_length: int) -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    outer, inner = accelerator.prepare(numbers(outer_length, 3), numbers(inner_length, 2))
    taken: list[Any] = []
    for (batch,) in outer:
        values = []
        for (other,) in inner:
            values += accelerator.gather_for_metrics(other).tolist()
        taken.append((accelerator.gather_for_metrics(batch).tolist(), values))
    return taken


@pytest.mark.parametrize(("outer", "inner"), [(12, 8), (6, 3), (10, 7), (13, 5), (7, 9)])
def test_nested_loops_gather_each_their_own(ranks: RankPool, outer: int, inner: int) -> None:
    batches = [part.tolist() for part in torch.arange(outer).split(6)]
    assert ranks(nested_loops, outer, inner) == [[(batch, list(range(inner))) for batch in batches]] * 2


def gather_late(length: int) -> list[int]:
    accelerator = Accelerator(strategy="ddp")
    loader = accelerator.prepare(numbers(length, 2))
    kept = [batch for (batch,) in loader]
    return sorted(accelerator.gather_for_metrics(torch.cat(kept)).tolist())


def test_gathering_after_the_loop_is_right_or_refused(ranks: RankPool) -> None:
    assert ranks(gather_late, 7) == [list(range(7))] * 2
    for error in ranks(gather_late, 9, return_exceptions=True):
        assert isinstance(error, DataError)
        assert "Call it inside the loop, for each batch" in str(error)


def facade_collectives() -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    rank = accelerator.process_index
    value = torch.tensor([float(rank), 1.0])
    return [
        accelerator.gather(value).tolist(),
        accelerator.reduce(value, "mean", scale=2.0).tolist(),
        accelerator.broadcast({"rank": rank, "value": value})["value"].tolist(),
        accelerator.pad_across_processes(value[: 1 + rank], pad_index=9).tolist(),
        accelerator.wait_for_everyone(),
    ]


def test_collectives_of_the_facade(ranks: RankPool) -> None:
    first, second = ranks(facade_collectives)
    assert first == [[0, 1, 1, 1], [1, 2], [0, 1], [0, 9], None]
    assert second == [[0, 1, 1, 1], [1, 2], [0, 1], [1, 1], None]


def outer_in_inner(outer_length: int, outer_batch: int, inner_length: int, inner_batch: int, kind: str) -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    outer, inner = accelerator.prepare(numbers(outer_length, outer_batch), numbers(inner_length, inner_batch))
    taken: list[Any] = []
    for (batch,) in outer:
        accelerator.gather_for_metrics(batch)
        for (other,) in inner:
            if kind == "inner lengths":
                taken.append(accelerator.gather_for_metrics(other.repeat_interleave(3)).tolist())
            elif kind == "inner named":
                taken.append(accelerator.gather_for_metrics(other.repeat_interleave(3), loader=inner).tolist())
            elif kind == "outer list":
                taken.append(accelerator.gather_for_metrics([batch, batch])[0].tolist())
            else:
                taken.append(accelerator.gather_for_metrics(batch).tolist())
    return taken


def test_an_outer_tensor_is_gathered_in_the_inner_loop(ranks: RankPool) -> None:
    assert ranks(outer_in_inner, 3, 2, 4, 2, "outer") == [[[0, 1, 2]]] * 2


def test_a_list_of_outer_tensors_is_gathered_in_the_inner_loop(ranks: RankPool) -> None:
    assert ranks(outer_in_inner, 9, 4, 12, 3, "outer list") == [[list(range(8))] * 2 + [[8]] * 2] * 2


def test_outputs_of_any_length_are_gathered_in_the_inner_loop(ranks: RankPool) -> None:
    inner = [[number for number in part for _ in range(3)] for part in ([0, 1, 2, 3], [4])]
    assert ranks(outer_in_inner, 16, 4, 5, 2, "inner lengths") == [inner * 2] * 2


def test_a_named_loader_settles_lengths_that_happen_to_fit_another(ranks: RankPool) -> None:
    inner = [[number for number in part for _ in range(3)] for part in ([0, 1, 2, 3], [4])]
    assert ranks(outer_in_inner, 12, 3, 5, 2, "inner named") == [inner * 2] * 2


def list_or_nothing() -> None:
    accelerator = Accelerator(strategy="ddp")
    accelerator.gather_for_metrics([torch.ones(1)] if accelerator.is_main_process else [])


def test_a_list_of_tensors_against_an_empty_one_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for error in ranks(list_or_nothing, return_exceptions=True):
        assert isinstance(error, ShapeMismatchError), error
