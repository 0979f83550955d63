"""The prepared scheduler against plain PyTorch: one step per optimizer step that was really taken."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import CollectiveError, PrepareError

KINDS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=12),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[2],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("built", ["before prepare", "after prepare"])
def test_follows_the_steps_taken(kind: str, built: str) -> None:
    case = Case(length=9, steps=2)
    accelerator = Accelerator("cpu", gradient_accumulation_steps=case.steps)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = KINDS[kind](optimizer) if built == "before prepare" else None
    loader = DataLoader(make_data(case), batch_size=case.batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = accelerator.prepare(scheduler if scheduler is not None else KINDS[kind](optimizer))

    plain = torch.optim.SGD(make_model().parameters(), lr=0.1, momentum=0.9)
    expected = KINDS[kind](plain)
    for _ in range(2):
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                accelerator.backward(sample_losses(model, x, y).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                plain.step()
                expected.step()
            assert scheduler.get_last_lr() == expected.get_last_lr()
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert optimizer.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]


# -- plateaus --------------------------------------------------------------------------------------------------


def make_plateau(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def train_with_plateau(strategy: str, precision: str, metrics: list[float], differing: bool) -> list[float]:
    """One optimizer step for each metric; the second overflows in float16."""
    accelerator = Accelerator(strategy, mixed_precision=precision)  # type: ignore[arg-type]
    model = make_model(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, make_plateau(optimizer))
    assert isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    rates = []
    for number, metric in enumerate(metrics):
        with accelerator.accumulate(model):
            x = torch.full((1, 3), 1e6 if number == 1 and precision == "fp16" else 1.0)
            accelerator.backward(0.01 * model(x).float().mean())
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step(metric + accelerator.process_index if differing else metric)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_plateau_lowers_the_rate_as_the_plain_one(ranks: RankPool) -> None:
    metrics = [3.0, 2.0, 2.5, 2.5, 1.0]
    plain = torch.optim.SGD(make_model().parameters(), lr=0.1)
    expected, rates = make_plateau(plain), []
    for metric in metrics:
        expected.step(metric)
        rates.append(plain.param_groups[0]["lr"])
    for got in [
        train_with_plateau("cpu", "no", metrics, False),
        *ranks(train_with_plateau, "ddp", "no", metrics, False),
    ]:
        assert got == rates


def test_overflow_holds_a_plateau() -> None:
    rates = train_with_plateau("cpu", "fp16", [1.0, 2.0, 2.0], False)
    assert rates == [0.1, 0.1, 0.05]


def test_a_metric_that_differs_between_ranks_is_an_error_on_all(ranks: RankPool) -> None:
    for error in ranks(train_with_plateau, "ddp", "no", [1.0], True, return_exceptions=True):
        assert isinstance(error, CollectiveError)
        assert "ReduceLROnPlateau got a different metric on each rank (1.0, 2.0)" in str(error)
        assert 'accelerator.reduce(metric, reduction="mean")' in str(error)


# -- the user's object ------------------------------------------------------------------------------------------


def prepared(steps: int = 1) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=steps)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train_step(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    x, y, _ = make_data(Case()).tensors
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_it_is_of_the_users_class_and_counts_steps_taken() -> None:
    accelerator, model, optimizer, scheduler = prepared(steps=2)
    assert isinstance(scheduler, lr_scheduler.StepLR)
    counts = []
    for _ in range(4):
        train_step(accelerator, model, optimizer, scheduler)
        counts.append(scheduler.last_epoch)
    assert counts == [0, 1, 1, 2]
    assert scheduler.step_size == 2
    assert scheduler.get_last_lr() == [0.05]


def test_its_state_is_that_of_a_plain_one() -> None:
    accelerator, model, optimizer, scheduler = prepared()
    plain = lr_scheduler.StepLR(torch.optim.SGD(make_model().parameters(), lr=0.1), 2, gamma=0.5)
    for _ in range(3):
        train_step(accelerator, model, optimizer, scheduler)
        plain.optimizer.step()
        plain.step()
    assert scheduler.state_dict() == plain.state_dict()
    other = prepared()
    other[3].load_state_dict(scheduler.state_dict())
    other[2].load_state_dict(optimizer.state_dict())
    for each in ((accelerator, model, optimizer, scheduler), other):
        train_step(*each)
    assert other[3].state_dict() == scheduler.state_dict()
    assert other[2].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025


def test_copies_are_of_the_users_class() -> None:
    *_, scheduler = prepared()
    for made in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert type(made) is lr_scheduler.StepLR
        assert made.state_dict() == scheduler.state_dict()


def test_one_of_an_unprepared_optimizer_is_refused() -> None:
    model = make_model()
    scheduler = lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    with pytest.raises(PrepareError, match=r"StepLR schedules a SGD that is not prepared\. Give its optimizer"):
        Accelerator("cpu").prepare(model, scheduler)


def test_two_schedulers_of_one_optimizer_follow_it() -> None:
    accelerator, model, optimizer, scheduler = prepared()
    second = accelerator.prepare(lr_scheduler.ExponentialLR(optimizer, 0.9))
    for _ in range(2):
        train_step(accelerator, model, optimizer, scheduler)
        second.step()
    assert (scheduler.last_epoch, second.last_epoch) == (2, 2)
