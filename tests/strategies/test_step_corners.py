"""Corners of the step that once went wrong: how a loop may clip, weigh, schedule and group in unusual ways."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, flat, make_data, make_model, sample_losses, train_plain, train_prepared
from rank_pool import RankPool
from strategies import DDP, DataError, StepError


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


def train_skipping_inside(case: Case, skipped: int) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = sample_losses(model, x, y).mean()
            if number == skipped:
                continue
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("skipped", "windows"), [(0, [[1], [2, 3]]), (1, [[0, 2], [3]]), (2, [[0, 1], [3]])])
def test_continue_inside_accumulate_leaves_the_batch_out_of_the_mean(
    ranks: RankPool, world: int, skipped: int, windows: list[list[int]]
) -> None:
    case = Case(length=8 * world, batch_size=2, world=world, steps=2)
    model, (x, y, _) = make_model(), make_data(case).tensors
    optimizer = sgd(model)
    for window in windows:
        samples = [2 * world * batch + sample for batch in window for sample in range(2 * world)]
        optimizer.zero_grad()
        sample_losses(model, x[samples], y[samples]).mean().backward()
        optimizer.step()
    for weights in ranks(train_skipping_inside, case, skipped, nproc=world):
        torch.testing.assert_close(weights, flat(model))


def leave_the_wrapper(how: str) -> None:
    case = Case(length=8, world=2, steps=2 if how == "no backward" else 1)
    accelerator = Accelerator("ddp", gradient_accumulation_steps=case.steps)
    model = make_model()
    if how == "unfrozen":
        next(model.parameters()).requires_grad_(False)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(make_data(case), batch_size=2))
    if how == "unfrozen":
        next(model.parameters()).requires_grad_(True)
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            called = {"forward": model.forward, "own module": accelerator.unwrap_model(model)}.get(how, model)
            if how != "no backward" or number % 2 == 0:
                accelerator.backward(sample_losses(called, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("forward", "did not come through a call of the prepared model"),
        ("own module", "did not come through a call of the prepared model"),
        ("no backward", "had no backward"),
        ("unfrozen", "was frozen when it was prepared"),
    ],
)
def test_what_ranks_would_not_synchronise_is_refused(ranks: RankPool, how: str, message: str) -> None:
    for error in ranks(leave_the_wrapper, how, return_exceptions=True):
        assert isinstance(error, StepError), error
        assert message in str(error)


def step_after(strategy: str, change: str) -> dict[str, Tensor]:
    """The weights after two steps of a model that was changed after prepare(), where rank 0 has them."""
    accelerator = Accelerator(strategy)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, optimizer = accelerator.prepare(net, sgd(net))
    changes = {
        "replace": lambda: setattr(net, "1", nn.Linear(4, 4)),
        "add": lambda: net.append(nn.Linear(4, 4)),
        "wrap": lambda: setattr(net, "1", nn.Sequential(net[1], nn.Linear(4, 4))),
        "replace parameter": lambda: setattr(net[0], "bias", nn.Parameter(torch.zeros(4))),
        "move": lambda: setattr(net, "1", nn.Sequential(net[1], nn.ReLU())),
        "remove": lambda: net.pop(0),
        "teacher": lambda: setattr(net[0], "teacher", teacher),
        "frozen": lambda: net.append(teacher),
        "replace by frozen": lambda: setattr(net, "1", teacher),
    }
    teacher = nn.Linear(4, 4).requires_grad_(False)
    with torch.no_grad():
        teacher.weight.copy_(torch.eye(4) * 2)
        teacher.bias.zero_()
    changes[change]()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()
    return {name: weights.clone() for name, weights in accelerator.get_state_dict(model).items()}


@pytest.mark.parametrize(("strategy", "world"), [("cpu", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_parameters_that_came_after_prepare_are_refused(ranks: RankPool, strategy: str, world: int) -> None:
    for change, name in {"replace": "1.weight", "add": "2.weight", "wrap": "1.1.weight"}.items():
        for error in ranks(step_after, strategy, change, nproc=world, return_exceptions=True):
            assert isinstance(error, StepError), change
            assert f"{name} of Sequential is not the parameter that was prepared" in str(error)
    for error in ranks(step_after, strategy, "replace parameter", nproc=world, return_exceptions=True):
        assert isinstance(error, StepError)
        assert re.search(r"0.bias (of Sequential is not the parameter|was replaced after prepare)", str(error))
    ranks(step_after, strategy, "move", nproc=world)


@pytest.mark.parametrize(("strategy", "world"), [("cpu", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_what_is_frozen_may_be_added_after_prepare(ranks: RankPool, strategy: str, world: int) -> None:
    for change in ("teacher", "frozen"):
        weights = ranks(step_after, strategy, change, nproc=world)[0]
        torch.testing.assert_close(weights, step_after("cpu", change))
    for error in ranks(step_after, strategy, "replace by frozen", nproc=world, return_exceptions=True):
        assert isinstance(error, StepError)
        assert re.search(r"1.weight (of Sequential is not the parameter|was replaced after prepare)", str(error))


def unfreeze_what_was_added() -> None:
    accelerator = Accelerator("ddp")
    net = nn.Sequential(nn.Linear(4, 4))
    model, optimizer = accelerator.prepare(net, sgd(net))
    net.append(nn.Linear(4, 4).requires_grad_(False))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
        net.requires_grad_(True)


def test_what_was_added_frozen_is_refused_once_it_is_trained(ranks: RankPool) -> None:
    for error in ranks(unfreeze_what_was_added, return_exceptions=True):
        assert isinstance(error, StepError)
        assert "1.weight of Sequential was frozen" in str(error)


def test_a_module_may_be_taken_out_on_one_process() -> None:
    step_after("cpu", "remove")


def test_clipping_leaves_out_an_optimizer_that_has_not_trained() -> None:
    accelerator = Accelerator("cpu")
    first, second = make_model(seed=1), make_model(seed=2)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    with accelerator.accumulate(first):
        accelerator.backward(sample_losses(first, *make_data(Case()).tensors[:2]).mean())
        assert accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 1.0) is not None


def test_the_order_in_which_models_are_named_makes_no_other_window() -> None:
    accelerator = Accelerator("cpu")
    first, second = make_model(seed=1), make_model(seed=2)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    assert accelerator.accumulate(first, second) is accelerator.accumulate(second, first)


def test_overlapping_windows_are_refused() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    first, second = make_model(seed=1), make_model(seed=2)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    with accelerator.accumulate(first):
        accelerator.backward(sample_losses(first, *make_data(Case()).tensors[:2]).mean())
    with pytest.raises(StepError, match="gradients would mix"), accelerator.accumulate(first, second):
        pass


@pytest.mark.parametrize("weight", [torch.tensor(-3.0), torch.tensor(float("nan"))])
def test_a_tensor_weight_that_is_no_count_is_refused(weight: Tensor) -> None:
    accelerator, model, _, loader = prepared(Case(length=4, steps=2))
    x, y, _ = next(iter(loader))
    with pytest.raises(StepError, match="expected a finite number >= 0"), accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean(), weight=weight)


def test_the_longer_of_two_zipped_loaders_goes_on_where_it_was_left() -> None:
    accelerator = Accelerator("cpu")
    model = make_model()
    labelled, other = (DataLoader(make_data(Case(length=n)), batch_size=2, shuffle=True) for n in (4, 8))
    model, optimizer, labelled, other = accelerator.prepare(model, sgd(model), labelled, other)
    epochs, taken = [], []
    for _ in range(4):
        for (x, y, _), (_, target, _) in zip(labelled, other, strict=False):
            with accelerator.accumulate(model, loader=labelled):
                accelerator.backward(sample_losses(model, x, y).mean())
                optimizer.step()
                optimizer.zero_grad()
            taken += target.flatten().tolist()
        epochs.append((labelled.epoch, other.epoch))
    assert epochs == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert sorted(taken[:8]) == sorted(taken[8:]) == sorted(set(taken))


def test_a_dataset_that_grew_is_named() -> None:
    samples = list(range(4))
    loader = Accelerator("cpu").prepare(DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
    samples += [4, 5]
    with pytest.raises(DataError, match="had 4 samples when its loader was prepared and has 6 now"):
        next(iter(loader))


def two_optimizers(precision: str) -> tuple[Tensor, Tensor]:
    """Two optimizers over the same parameters step in one window whose weight is known at its close only."""
    x, counts = torch.randn(4, 3, dtype=torch.float64), [3.0, 1.0]
    plain = make_model()
    losses = [sample_losses(plain, part, torch.ones(2).double()).mean() for part in x.split(2)]
    (sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)).backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.3 * parameter.grad
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2, mixed_precision=precision)
    model = make_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for rate in (0.1, 0.2)]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for part, count in zip(x.split(2), counts, strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, part, torch.ones(2).double()).mean(), weight=count)
            for optimizer in optimizers:
                optimizer.step()
    return flat(model), flat(plain)


def test_gradients_of_two_optimizers_are_corrected_once() -> None:
    got, expected = two_optimizers("no")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(StepError, match="would be unscaled twice"):
        two_optimizers("fp16")
