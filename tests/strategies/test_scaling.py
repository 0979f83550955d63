"""The loss scale of float16: one verdict for all ranks, one scale for each window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool


def make_model() -> nn.Module:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=2.0)


def make_loader(length: int, overflowing: int) -> DataLoader[Any]:
    x = torch.full((length, 2), 0.25)
    x[overflowing] = 1e6
    return DataLoader(TensorDataset(x), batch_size=1)


@dataclass
class Seen:
    """What one rank saw after every micro-batch."""

    weights: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def train(strategy: str, length: int, overflowing: int, steps: int) -> Seen:
    accelerator = Accelerator(strategy, mixed_precision="fp16", gradient_accumulation_steps=steps)
    model = make_model()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, make_loader(length, overflowing)
    )
    seen = Seen()
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = model(x).float().mean() / 16  # 65536 times the gradient 1 would overflow by itself
            scaler = optimizer._link.window.scaler
            seen.scales.append(scaler._scaler.get_scale())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen.weights.append(model.bias.item())
        seen.rates.append(optimizer.param_groups[0]["lr"])
        seen.skipped.append(accelerator.optimizer_step_was_skipped)
    return seen


@pytest.mark.parametrize("overflowing", [2, 3])  # in the second global batch: of rank 0, of rank 1
def test_overflow_on_one_rank_skips_on_all(ranks: RankPool, overflowing: int) -> None:
    for seen in ranks(train, "ddp", 8, overflowing, 1):
        assert seen.skipped == [False, True, False, False]
        assert seen.rates == [1, 1, 2 / 3, 1 / 2]
        assert seen.scales == [65536, 65536, 32768, 32768]
        taken = [0.125, 0, 0.125 / 2, 0.125 / 3]  # the bias has gradient 1/16
        assert seen.weights == pytest.approx([0.5 - sum(taken[: k + 1]) for k in range(4)], rel=1e-3)


@pytest.mark.parametrize("overflowing", [0, 3])
def test_the_scale_changes_only_between_windows(ranks: RankPool, overflowing: int) -> None:
    for seen in ranks(train, "ddp", 12, overflowing, 2):  # windows of 4 samples
        assert seen.scales == [65536, 65536, 32768, 32768, 32768, 32768]
        assert seen.skipped == [False, True, True, False, False, False]
        assert seen.rates == [2, 2, 2, 1, 1, 2 / 3]


def test_overflow_on_one_process_skips(caplog: pytest.LogCaptureFixture) -> None:
    seen = train("cpu", 4, 1, 1)
    assert seen.skipped == [False, True, False, False]
    assert seen.rates == [1, 1, 2 / 3, 1 / 2]
    assert caplog.text.count("float16 overflow: optimizer and scheduler skip this step") == 1


def test_the_scale_grows_after_enough_good_windows() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16")
    model = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with accelerator.accumulate(model):
        optimizer._link.window.scaler._scaler.set_growth_interval(2)
    scales = []
    for _ in range(5):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).float().mean() / 16)
            optimizer.step()
            optimizer.zero_grad()
        scales.append(optimizer._link.window.scaler.value)
    assert scales == [65536, 131072, 131072, 262144, 262144]


def train_two_windows() -> tuple[list[float], list[float], float, float]:
    accelerator = Accelerator("ddp", mixed_precision="fp16")
    torch.manual_seed(0)
    first, second = make_model(), make_model()
    first, second, of_first, of_second = accelerator.prepare(first, second, sgd(first), sgd(second))
    scales: tuple[list[float], list[float]] = ([], [])
    for number in range(3):
        for model, optimizer, seen in ((first, of_first, scales[0]), (second, of_second, scales[1])):
            with accelerator.accumulate(model):
                overflows = number == 1 and model is first and dist.get_rank() == 1
                accelerator.backward(model(torch.full((1, 2), 1e6 if overflows else 1.0)).float().mean() / 16)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(optimizer._link.window.scaler.value)
    return *scales, first.bias.item(), second.bias.item()


def test_two_windows_have_scales_of_their_own(ranks: RankPool) -> None:
    for of_first, of_second, first, second in ranks(train_two_windows):
        assert of_first == [65536, 32768, 32768]
        assert of_second == [65536, 65536, 65536]
        assert first == pytest.approx(0.5 - 2 * 0.125)
        assert second == pytest.approx(0.5 - 3 * 0.125)


def test_a_later_step_taken_is_not_called_skipped() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16")
    model = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    skipped = []
    for value in (1e6, 1.0):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 2), value)).float().mean() / 16)
            optimizer.step()
            optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
    assert skipped == [True, False]
