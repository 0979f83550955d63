"""Ranks that prepare different things, or with different settings, hear of it before they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DDP, ConfigurationError, PrepareError, collectives
from strategies.prepared.alike import Fact

Make = Callable[[int], tuple[Any, ...]]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)


def momentum(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    return model, sgd(model, momentum=0.9 * rank)


def learning_rate_of_a_group(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.5 + rank)}]
    return model, torch.optim.SGD(groups, lr=0.1)


def another_class(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    return model, torch.optim.AdamW(model.parameters()) if rank else sgd(model)


def a_loader_more(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    return (model, sgd(model), loader()) if rank else (model, sgd(model))


def another_shape(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1 + rank)
    return model, sgd(model)


def frozen_on_one(rank: int) -> tuple[Any, ...]:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(not rank)
    return model, sgd(model)


def a_layer_more(rank: int) -> tuple[Any, ...]:
    model = nn.Sequential(nn.Linear(3, 3), *[nn.Linear(3, 3)] * rank)
    return model, sgd(model)


def scheduler(rank: int) -> tuple[Any, ...]:
    optimizer = sgd(model := nn.Linear(3, 1))
    schedule = torch.optim.lr_scheduler
    return model, optimizer, schedule.StepLR(optimizer, 1) if rank else schedule.ExponentialLR(optimizer, 0.9)


def prepare_apart(make: Make) -> str:
    accelerator = Accelerator("ddp")
    objects = make(accelerator.process_index)
    with pytest.raises(PrepareError) as raised:
        accelerator.prepare(*objects)
    collectives.barrier(accelerator._world)  # the group is as good as before
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (momentum, ["optimizer 0 group 0 momentum", "rank 0: 0.0; rank 1: 0.9"]),
        (learning_rate_of_a_group, ["optimizer 0 group 1 lr", "rank 0: 0.5; rank 1: 1.5"]),
        (another_class, ["optimizer 0", "rank 0: SGD; rank 1: AdamW"]),
        (a_loader_more, ["rank 0: model, optimizer;", "rank 1: model, optimizer, loader"]),
        (another_shape, ["model 0 weight", "rank 0: (1, 3) float32", "rank 1: (2, 3) float32"]),
        (frozen_on_one, ["model 0 bias", "rank 0: (1,) float32;", "rank 1: (1,) float32, frozen"]),
        (a_layer_more, ["model 0", "rank 0: Sequential of 2 parameters;", "rank 1: Sequential of 4 parameters"]),
        (scheduler, ["scheduler 0", "rank 0: ExponentialLR;", "rank 1: StepLR"]),
    ],
)
def test_ranks_that_prepare_different_objects_hear_of_it(ranks: RankPool, make: Make, told: list[str]) -> None:
    for message in ranks(prepare_apart, make):
        for words in told:
            assert words in message


def configure_apart(name: str, value: Any, base: dict[str, Any]) -> str:
    mine = value[1] if isinstance(value, tuple) else value
    accelerator = Accelerator("ddp")  # to know its rank
    apart = Accelerator(**base, **({name: mine} if accelerator.process_index else {}))
    with pytest.raises(ConfigurationError) as raised:
        apart.prepare(nn.Linear(3, 1))
    collectives.barrier(apart._world)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("mixed_precision", "bf16", ["mixed_precision", "rank 0: no (default);", "rank 1: bf16 (code)"]),
        ("mixed_precision", "fp16", ["rank 1: fp16 (code)"]),
        ("gradient_accumulation_steps", 2, ["gradient_accumulation_steps", "rank 0: 1 (default);", "rank 1: 2 (code)"]),
        ("global_batch_size", 8, ["global_batch_size", "rank 0: None (default);", "rank 1: 8 (code)"]),
        ("split_batches", True, ["split_batches", "rank 1: True (code)"]),
        ("detect_nonfinite", True, ["detect_nonfinite", "rank 1: True (code)"]),
    ],
)
def test_ranks_with_different_settings_hear_of_it(ranks: RankPool, name: str, value: Any, told: list[str]) -> None:
    for message in ranks(configure_apart, name, value, {"strategy": "ddp"}):
        for words in told:
            assert words in message


def test_ranks_with_different_options_of_the_strategy_hear_of_it(ranks: RankPool) -> None:
    for message in ranks(configure_strategy_apart):
        assert "ddp.find_unused_parameters" in message
        assert "rank 0: False (code); rank 1: True (code)" in message


def configure_strategy_apart() -> str:
    first = Accelerator("ddp")  # which lives on: a rank that left now might find the other still connecting
    apart = Accelerator(DDP(find_unused_parameters=bool(first.process_index)))
    with pytest.raises(ConfigurationError) as raised:
        apart.prepare(nn.Linear(3, 1))
    return str(raised.value)


def on_devices_of_their_own() -> bool:
    """What tells ranks apart by right: the number of the device, and values that print an address or a set's order."""
    accelerator = Accelerator("ddp")
    first, second = Fact.of("device", "cuda:0"), Fact.of("device", torch.device("cuda", 1))
    words = {f"word{number}" for number in range(20)}
    gathered = collectives.all_gather_objects(Fact.of("x", (words, {"f": sgd, "o": object()})), accelerator._world)
    return first.value == second.value and gathered[0] == gathered[1]


def test_what_ranks_differ_in_by_right_is_not_compared(ranks: RankPool) -> None:
    assert ranks(on_devices_of_their_own) == [True, True]
