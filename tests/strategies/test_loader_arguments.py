"""Every argument of torch's DataLoader is carried over to the prepared one, or refused with its reason."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, get_worker_info

from accelerator import Accelerator
from datasets_of_numbers import Numbers
from strategies import DataError


class Backwards(SequentialSampler):
    def __iter__(self) -> Any:
        return iter(reversed(range(len(self))))


class Worker(Numbers):
    """Its samples tell how their worker was made."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        process = type(multiprocessing.current_process()).__name__
        return index, self.length, process if info is not None else "the loop's own process"


def lengthen(worker: int) -> None:
    get_worker_info().dataset.length += 1000  # type: ignore[union-attr]  # in a worker


def tell(batch: list[Any]) -> tuple[str, list[Any]]:
    return "collated", batch


def batches(loader: DataLoader[Any]) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


def settings(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """What torch's iterator over `loader` goes by."""
    iterator: Any = loader._get_iterator()
    return tuple(
        getattr(iterator, name, None)
        for name in ("_num_workers", "_prefetch_factor", "_timeout", "_persistent_workers", "_pin_memory")
    )


def orders(loader: DataLoader[Any]) -> Any:
    """Of a shuffled loader: the samples of an epoch, which are all of them, out of order."""
    (order,) = batches(loader)
    return sorted(order), order != sorted(order)


NUMBERS = Numbers(7)


@dataclass(frozen=True)
class Case:
    """Options that give an argument something else than its default, and what is then the same as torch's own."""

    options: dict[str, Any]
    same: Callable[[DataLoader[Any]], Any] = batches
    dataset: Any = NUMBERS


WORKER = {"num_workers": 1, "multiprocessing_context": "fork", "collate_fn": tell, "batch_size": 4}
CASES = {
    "dataset": Case({}, dataset=Worker(3)),
    "batch_size": Case({"batch_size": 3}),
    "shuffle": Case({"shuffle": True, "batch_size": 7}, orders),
    "sampler": Case({"sampler": Backwards(Numbers(7))}),
    "batch_sampler": Case({"batch_sampler": [[0, 3], [2]]}),
    "num_workers": Case(WORKER | {"num_workers": 2}, dataset=Worker(7)),
    "collate_fn": Case({"collate_fn": tell}),
    "pin_memory": Case({"pin_memory": True}, settings),
    "drop_last": Case({"drop_last": True, "batch_size": 3}),
    "timeout": Case(WORKER | {"timeout": 30}, settings),
    "worker_init_fn": Case(WORKER | {"worker_init_fn": lengthen}, dataset=Worker(7)),
    "multiprocessing_context": Case(WORKER, dataset=Worker(7)),
    "generator": Case({"generator": torch.Generator().manual_seed(3), "shuffle": True, "batch_size": 7}, orders),
    "prefetch_factor": Case(WORKER | {"prefetch_factor": 3}, settings),
    "persistent_workers": Case(WORKER | {"persistent_workers": True}, settings),
    "pin_memory_device": Case({"pin_memory_device": "cuda"}, lambda loader: loader.pin_memory_device),
}
REFUSED = {"in_order": ({"in_order": False}, "in_order=False lets workers hand batches over in any order")}


def arguments() -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(DataLoader).parameters)
    assert all(one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in found.values())
    return found


WITH_SEEDS = ["dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn"]  # those that get stand-ins


@pytest.mark.parametrize(
    ("name", "seed_samples"), [*((name, False) for name in arguments()), *((name, True) for name in WITH_SEEDS)]
)
@pytest.mark.filterwarnings("ignore:.*pin_memory")  # no accelerator here; a deprecated argument
def test_an_argument_is_carried_over_or_refused(name: str, seed_samples: bool) -> None:
    accelerator = Accelerator(strategy="cpu", seed_samples=seed_samples)
    if name in REFUSED:
        options, message = REFUSED[name]
        with pytest.raises(DataError, match=message):
            accelerator.prepare(DataLoader(Numbers(7), **options))
        return
    assert name in CASES, f"torch's DataLoader has a new argument, {name}: carry it over or refuse it, and add a case"
    case = CASES[name]
    default = arguments()[name].default
    assert name == "dataset" or case.options[name] != default
    plain = DataLoader(case.dataset, **case.options)
    expected = case.same(DataLoader(case.dataset, **case.options))
    loader = accelerator.prepare(plain)
    assert case.same(loader) == expected
    if name != "shuffle" and "sampler" not in name:  # the order is ours; whose it is, the samples tell
        assert getattr(loader, name) == getattr(plain, name)
    assert plain._iterator is None
