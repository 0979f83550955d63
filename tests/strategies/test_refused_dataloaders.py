"""Loaders that cannot be cut so that every sample is seen once are refused; on one process any will do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from accelerator import Accelerator
from datasets_of_numbers import Numbers, Stream
from rank_pool import RankPool
from strategies import DataError


class Forwards(SequentialSampler):
    """A sampler of the user's own."""


class Lengthless(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(1)


def batched(sampler: Any) -> BatchSampler:
    return BatchSampler(sampler, batch_size=2, drop_last=False)


def make(kind: str) -> DataLoader[Any]:
    data = Numbers(10)
    makers: dict[str, Any] = {
        "distributed": lambda: DataLoader(data, sampler=DistributedSampler(data, 2, 0)),
        "distributed batches": lambda: DataLoader(
            data, batch_sampler=BatchSampler(DistributedSampler(data, 2, 0), 2, False)
        ),
        "out of order": lambda: DataLoader(data, num_workers=1, in_order=False),
        "empty": lambda: DataLoader(Numbers(0)),
        "all dropped": lambda: DataLoader(data, batch_size=11, drop_last=True),
        "no length": lambda: DataLoader(Lengthless(), sampler=SequentialSampler(data)),
        "weighted": lambda: DataLoader(data, sampler=WeightedRandomSampler([1.0] * 10, 10)),
        "replacement": lambda: DataLoader(data, sampler=RandomSampler(data, replacement=True)),
        "some": lambda: DataLoader(data, sampler=RandomSampler(data, num_samples=4)),
        "own sampler": lambda: DataLoader(data, sampler=Forwards(data)),
        "own batches": lambda: DataLoader(data, batch_sampler=[[0, 1], [2]]),
        "no batches": lambda: DataLoader(data, batch_size=None),
        "endless": lambda: DataLoader(data, sampler=Endless()),
        "weights": lambda: DataLoader(data, sampler=WeightedRandomSampler([1.0, float("nan"), -1.0], 10)),
        "zero weights": lambda: DataLoader(data, sampler=WeightedRandomSampler([0.0] * 10, 10)),
        "weights of batches": lambda: DataLoader(
            data, batch_sampler=batched(WeightedRandomSampler([float("nan")] * 10, 10))
        ),
        "stream": lambda: DataLoader(Stream(10), batch_size=2),
    }
    return makers[kind]()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("distributed", "already has a DistributedSampler"),
        ("distributed batches", "already has a DistributedSampler"),
        ("out of order", "in_order=False lets workers hand batches over in any order"),
        ("empty", "Numbers is empty"),
        ("all dropped", "10 samples, fewer than one global batch of 11, and drop_last=True"),
        ("no length", "Lengthless has no __len__"),
        ("weights", "weight 1 is nan, and 1 others are wrong too"),
        ("zero weights", "all weights are 0"),
        ("weights of batches", "weight 0 is nan, and 9 others are wrong too"),
    ],
)
def test_a_loader_that_cannot_be_right_is_refused(kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Accelerator(strategy="cpu").prepare(make(kind))


@pytest.mark.parametrize("in_batches", [False, True])
def test_weights_that_become_wrong_are_refused_in_the_next_epoch(in_batches: bool) -> None:
    sampler = WeightedRandomSampler([1.0] * 10, 10)
    options = {"batch_sampler": batched(sampler)} if in_batches else {"sampler": sampler}
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(10), **options))
    assert len(list(loader)) > 0
    sampler.weights[3] = float("nan")
    with pytest.raises(DataError, match="weight 3 is nan"):
        list(loader)


class Endless:
    """A sampler that does not know how many it gives."""

    def __iter__(self) -> Any:
        return iter(range(10))


def prepare_on_two(kind: str) -> None:
    Accelerator(strategy="ddp").prepare(make(kind))


@pytest.mark.parametrize(("kind", "named"), [("endless", "Endless has no __len__")])
def test_what_cannot_be_cut_is_refused_on_two_ranks(ranks: RankPool, kind: str, named: str) -> None:
    for error in ranks(prepare_on_two, kind, return_exceptions=True):
        assert isinstance(error, DataError), error
        assert named in str(error)


class Unplaced(SequentialSampler):
    """Would know its rank in a process group, and there is none."""

    rank = None
    num_replicas = None


def test_a_sampler_that_cuts_nothing_is_taken() -> None:
    numbers = Numbers(4)
    loader = Accelerator(strategy="cpu").prepare(DataLoader(numbers, sampler=Unplaced(numbers)))
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in DataLoader(numbers)]


@pytest.mark.parametrize("kind", ["own sampler", "own batches", "no batches", "stream"])
def test_on_one_process_any_loader_is_taken_as_it_is(kind: str) -> None:
    loader = Accelerator(strategy="cpu").prepare(make(kind))
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in make(kind)]


@pytest.mark.parametrize("kind", ["stream", "own sampler"])
def test_the_last_short_window_of_a_stream_is_right(kind: str) -> None:
    """7 batches of 3, the last of 1, in windows of 3: steps equal to plain torch's on whole windows."""
    data: Any = Stream(19) if kind == "stream" else TensorDataset(torch.arange(19.0).reshape(-1, 1))
    sampler = None if kind == "stream" else Forwards(data)
    samples = torch.arange(19.0).reshape(-1, 1)
    plain = nn.Linear(1, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    accelerator = Accelerator(strategy="cpu", gradient_accumulation_steps=3)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), DataLoader(data, batch_size=3, sampler=sampler)
    )
    for batch in loader:
        inputs = (batch if kind == "stream" else batch[0]).double()
        with accelerator.accumulate(model):
            accelerator.backward((model(inputs) - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    for window in samples.double().split(9):
        (plain(window) - 1).square().mean().backward()  # type: ignore[no-untyped-call]  # torch
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert torch.allclose(model.weight, plain.weight, atol=1e-12)
    assert torch.allclose(model.bias, plain.bias, atol=1e-12)


def too_small_to_split() -> None:
    Accelerator(strategy="ddp", split_batches=True).prepare(DataLoader(Numbers(9), batch_size=1))


def test_fewer_samples_than_ranks_cannot_be_split(ranks: RankPool) -> None:
    for error in ranks(too_small_to_split, return_exceptions=True):
        assert "batch_size is 1 and split_batches=True, fewer than the 2 processes" in str(error)
