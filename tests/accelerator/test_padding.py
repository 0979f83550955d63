"""Batches filled up with ghosts train as short ones do, where the loss leaves the ghosts out."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerator import Accelerator, PadBatches
from loops import assert_close, sgd, train_plain
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import ConfigurationError, DataError


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


def train_padded(case: Case, *, stream: bool = False) -> tuple[Tensor, list[int], list[float]]:
    """The weights after training, the length of every batch, and the losses of every sample of the epoch."""
    accelerator = Accelerator("ddp" if case.world > 1 else "cpu", gradient_accumulation_steps=case.steps)
    model, data = make_model(), make_data(case)
    dataset = Stream(list(data)) if stream else data  # type: ignore[arg-type]  # it can be gone over
    padded = DataLoader(dataset, batch_size=case.batch_size, collate_fn=PadBatches(case.batch_size))
    model, optimizer, loader = accelerator.prepare(model, sgd(model), padded)
    lengths, gathered = [], []
    for (x, y, _), weights in loader:
        with accelerator.accumulate(model):
            each = sample_losses(model, x, y)
            accelerator.backward((each * weights).sum() / weights.sum(), weight=weights.sum())
            optimizer.step()
            optimizer.zero_grad()
        lengths.append(len(x))
        each, weights = accelerator.gather_for_metrics((each.detach(), weights))
        gathered += each[weights > 0].tolist()
    return flat(model), lengths, gathered


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("length", [14, 17])  # on two ranks 17 leaves one of them nothing at all
def test_ghosts_weigh_nothing(ranks: RankPool, world: int, steps: int, length: int) -> None:
    case = Case(length=length, batch_size=4, world=world, steps=steps)
    for weights, lengths, gathered in ranks(train_padded, case, nproc=world):
        assert_close(weights, train_plain(case))
        assert set(lengths) == {4}
        assert len(gathered) == length


def test_ghosts_of_a_stream_weigh_nothing() -> None:
    case = Case(length=14, batch_size=4, steps=3)
    weights, lengths, gathered = train_padded(case, stream=True)
    assert_close(weights, train_plain(case))
    assert lengths == [4] * 4
    assert len(gathered) == 14


def test_the_user_s_own_collate_sees_the_ghosts_too() -> None:
    pad = pickle.loads(pickle.dumps(PadBatches(3, sorted)))  # as it travels to workers that are spawned
    batch, weights = pad([5, 2])
    assert batch == [2, 5, 5]
    assert torch.equal(weights, torch.tensor([1.0, 1.0, 0.0]))


def evaluate_inside_a_loop() -> list[float]:
    """An evaluation whose last batch leaves one rank nothing, inside a loop over batches of the same length."""
    accelerator = Accelerator("ddp")
    train, tested = (
        DataLoader(TensorDataset(torch.arange(float(length))), 2, collate_fn=PadBatches(2)) for length in (8, 5)
    )
    train, tested = accelerator.prepare(train, tested)
    seen: list[float] = []
    for _ in train:
        with torch.no_grad():
            for batch in tested:
                (x,), weights = accelerator.gather_for_metrics(batch)
                seen += x[weights > 0].tolist()
        break
    accelerator.end_training()
    return seen


def test_an_evaluation_inside_a_loop_counts_no_ghosts(ranks: RankPool) -> None:
    assert ranks(evaluate_inside_a_loop, nproc=2) == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2


def test_a_collate_function_may_take_samples_apart() -> None:
    labels, _ = PadBatches(3, lambda samples: [sample.pop("label") for sample in samples])([{"label": 1}, {"label": 2}])
    assert labels == [1, 2, 1]


def test_what_cannot_be_padded_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="length is 0; expected at least 1: the loader's batch_size"):
        PadBatches(0)
    with pytest.raises(DataError, match=r"PadBatches\(length=2\) got a batch of 3 samples. Give it the loader's"):
        PadBatches(2)([1, 2, 3])
    with pytest.raises(DataError, match=r"got Tensor instead of a list of samples\. Give the loader a batch_size"):
        next(iter(DataLoader(torch.zeros(3, 2), batch_size=None, collate_fn=PadBatches(4))))  # type: ignore[arg-type]
