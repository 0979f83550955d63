"""Corners of the step that once went wrong: how a loop may clip, weigh, schedule and group in unusual ways."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, flat, make_data, make_model, sample_losses, train_plain, train_prepared
from rank_pool import RankPool
from strategies import DDP, StepError


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def prepared(case: Case) -> tuple[Accelerator, Any, Any, Any]:
    strategy = "ddp" if case.world > 1 else "cpu"
    accelerator = Accelerator(strategy, mixed_precision=case.precision, gradient_accumulation_steps=case.steps)
    model = make_model(case.dtype)
    return accelerator, *accelerator.prepare(model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size))


def plain_weights(case: Case) -> Tensor:
    model, (x, y, _) = make_model(), make_data(case).tensors
    optimizer = sgd(model)
    for window in case.windows():
        samples = [sample for batch in window for sample in batch]
        optimizer.zero_grad()
        sample_losses(model, x[samples], y[samples]).mean().backward()
        optimizer.step()
    return flat(model)


def train_with(case: Case, strategy: DDP) -> Tensor:
    return train_prepared(case, strategy).weights[-1]


@pytest.mark.parametrize(("hook", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_compressed_gradients_stay_close(ranks: RankPool, hook: Any, tolerance: float) -> None:
    case = Case(length=15, world=2, steps=3)
    expected, start = train_plain(case).weights[-1], flat(make_model())
    for weights in ranks(train_with, case, DDP(comm_hook=hook)):
        assert (weights - expected).norm() <= tolerance * (expected - start).norm()


def train_on_two_losses_of_one_forward(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            losses = sample_losses(model, x, y)
            accelerator.backward(0.25 * losses.mean(), retain_graph=True)
            accelerator.backward(0.75 * losses.mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("steps", [1, 2])
def test_several_losses_of_one_forward_add_up(steps: int) -> None:
    case = Case(length=12, steps=steps)
    torch.testing.assert_close(train_on_two_losses_of_one_forward(case), plain_weights(case))


@pytest.mark.parametrize("steps", [1, 2])
def test_several_losses_of_one_forward_are_refused_where_ranks_synchronise(ranks: RankPool, steps: int) -> None:
    case = Case(length=12, steps=steps, world=2)
    for error in ranks(train_on_two_losses_of_one_forward, case, return_exceptions=True):
        assert isinstance(error, StepError), error
        assert "twice without a forward" in str(error)


def test_weighted_losses_of_a_micro_batch_add_up_without_accumulation() -> None:
    case = Case(length=9)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            for share in (0.25, 0.75):
                accelerator.backward(share * sample_losses(model, x, y).mean(), weight=float(len(x)))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat(model), plain_weights(case))


@pytest.mark.parametrize("how", ["an exception", "not stepped", "discarded"])
def test_a_window_that_was_clipped_and_not_stepped_leaves_no_trace(how: str) -> None:
    accelerator, model, optimizer, loader = prepared(Case(length=6, precision="fp16"))
    for number, (x, y, _) in enumerate(loader):
        with contextlib.suppress(ValueError), accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if number == 0 and how == "an exception":
                raise ValueError
            if number > 0 or how == "stepped":
                optimizer.step()
            if number > 0 or how == "discarded":
                optimizer.zero_grad()
        if how == "not stepped" and number == 0:
            optimizer.zero_grad()
    assert not accelerator.optimizer_step_was_skipped


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("steps", [2, 3])
def test_waits_for_the_close_where_the_loop_steps_under_sync_gradients(steps: int) -> None:
    case = Case(length=12, steps=steps)
    accelerator, model, optimizer, loader = prepared(case)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            if accelerator.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
    assert scheduler.last_epoch == len(case.windows())


def test_a_closure_outside_accumulate_after_a_window() -> None:
    accelerator = Accelerator("cpu")
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2))
    x, y, _ = make_data(Case()).tensors

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sample_losses(model, x, y).mean()
        accelerator.backward(loss)
        return loss

    with accelerator.accumulate(model):
        optimizer.step(closure)
    optimizer.step(closure)


def test_a_group_of_another_model_joins_their_windows() -> None:
    accelerator = Accelerator("cpu")
    first, second = make_model(seed=1), make_model(seed=2)
    first, second, optimizer = accelerator.prepare(first, second, sgd(first))
    x, y, _ = make_data(Case()).tensors
    with accelerator.accumulate(first):
        accelerator.backward(sample_losses(first, x, y).mean())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.add_param_group({"params": list(second.parameters())})
    with pytest.raises(StepError, match="also holds parameters of"):
        accelerator.accumulate(first)


def test_a_loss_of_a_model_that_accumulate_does_not_name_says_so() -> None:
    accelerator = Accelerator("cpu")
    first, second = make_model(seed=1), make_model(seed=2)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    with accelerator.accumulate(second), pytest.raises(StepError, match="accumulate"):
        accelerator.backward(sample_losses(first, *make_data(Case()).tensors[:2]).mean())
