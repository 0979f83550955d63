"""Windows in loops as people write them, against plain PyTorch in one process with the global batch."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from loops import assert_close, prepared, sgd, step, train_plain
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import StepError

# -- backward outside accumulate -------------------------------------------------------------------------------


def train_without_accumulate(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for _ in range(case.epochs):
        for x, y, _ in loader:
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_backward_outside_accumulate_is_right_without_accumulation(ranks: RankPool, world: int) -> None:
    for length in (12, 11, 9):  # the last: a rank with nothing left
        case = Case(length=length, world=world, epochs=1)
        for weights in ranks(train_without_accumulate, case, nproc=world):
            assert_close(weights, train_plain(case))


def test_backward_outside_accumulate_is_refused_with_accumulation() -> None:
    with pytest.raises(StepError, match=r"backward\(\) ran outside accumulate\(\) although gradients are to be accum"):
        train_without_accumulate(Case(steps=2))


def test_backward_outside_accumulate_is_refused_for_two_float16_optimizers() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16")
    first, second = make_model(torch.float32), make_model(torch.float32)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    with pytest.raises(StepError, match="float16 and 2 optimizers, whose loss scales must not mix"):
        accelerator.backward(first(torch.ones(1, 3)).sum())


# -- the losses of one micro-batch -----------------------------------------------------------------------------


def train_on_two_losses(case: Case, weighted: bool) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            weight = float(len(x)) if weighted else None
            accelerator.backward(0.25 * sample_losses(model, x, y).mean(), weight=weight)
            accelerator.backward(0.75 * sample_losses(model, x, y).mean(), weight=weight)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize(("weighted", "steps"), [(False, 1), (False, 2), (True, 2)])
def test_several_losses_of_a_micro_batch_add_up(weighted: bool, steps: int) -> None:
    case = Case(length=9, steps=steps)
    assert_close(train_on_two_losses(case, weighted), train_plain(case))


def test_several_losses_add_up_on_two_processes(ranks: RankPool) -> None:
    case = Case(length=11, world=2, steps=2)
    for weights in ranks(train_on_two_losses, case, False):
        assert_close(weights, train_plain(case))


def test_losses_of_one_micro_batch_share_its_weight() -> None:
    accelerator, model, _, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean(), weight=2)
        with pytest.raises(StepError, match=r"got weight=3\.0 after weight=2\.0 in the same micro-batch"):
            accelerator.backward(sample_losses(model, x, y).mean(), weight=3)


def test_weights_are_given_in_all_micro_batches_of_a_window_or_in_none() -> None:
    accelerator, model, optimizer, loader = prepared(Case(steps=2))
    iterator = iter(loader)
    x, y, _ = next(iterator)
    step(accelerator, model, optimizer, x, y)
    x, y, _ = next(iterator)
    with accelerator.accumulate(model), pytest.raises(StepError, match="weight= in some micro-batches of one window"):
        accelerator.backward(sample_losses(model, x, y).mean(), weight=2)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), True, "3", torch.ones(2)])
def test_a_weight_that_is_no_count_is_refused(weight: Any) -> None:
    accelerator, model, _, _ = prepared(Case())
    with accelerator.accumulate(model), pytest.raises(StepError, match=r"weight (is|has shape) .*expected .*number"):
        accelerator.backward(sample_losses(model, *make_data(Case()).tensors[:2]).mean(), weight=weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("matrix", r"loss has shape \(8, 1\); expected one loss per sample, of shape \(8,\)"),
        ("detached", "loss carries no gradient. Was it detached"),
        ("no_grad", "loss carries no gradient. Was it detached, computed under torch.no_grad"),
        ("number", "loss is float; expected a scalar tensor"),
        ("tuple", "loss is tuple; expected a scalar tensor"),
        ("complex", r"loss is a complex number \(torch.complex128\); expected a real one"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_loss_that_is_none_is_refused(kind: str, message: str, inside: bool) -> None:
    accelerator, model, _, _ = prepared(Case())
    losses = sample_losses(model, *make_data(Case()).tensors[:2])
    with torch.no_grad():
        silent = sample_losses(model, *make_data(Case()).tensors[:2]).mean()
    given: Any = {
        "matrix": losses.unsqueeze(1),
        "detached": losses.mean().detach(),
        "no_grad": silent,
        "number": losses.mean().item(),
        "tuple": (losses.mean(),),
        "complex": losses.mean() * 1j,
    }[kind]
    if inside:
        with accelerator.accumulate(model), pytest.raises(StepError, match=message):
            accelerator.backward(given)
    else:
        with pytest.raises(StepError, match=message):
            accelerator.backward(given)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_for_the_loss_is_refused_in_every_window(steps: int) -> None:
    accelerator, model, _, loader = prepared(Case(steps=steps))
    x, y, _ = next(iter(loader))
    loss = sample_losses(model, x, y).mean()
    with accelerator.accumulate(model), pytest.raises(StepError, match=r"takes no gradient=.*: multiply the loss"):
        accelerator.backward(loss, gradient=torch.tensor(2.0))


def test_a_loss_of_one_element_is_a_scalar() -> None:
    case = Case(length=9, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean(dim=0, keepdim=True))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case))


# -- clipping --------------------------------------------------------------------------------------------------


def test_clipping_inside_an_open_window_changes_nothing() -> None:
    accelerator, model, _, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(1000 * sample_losses(model, x, y).mean())
        before = [parameter.grad.clone() for parameter in model.parameters()]
        assert accelerator.clip_grad_norm_(model.parameters(), 1e-3) is None
        assert accelerator.clip_grad_value_(model.parameters(), 1e-3) is None
        assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_clipping_by_value_equals_the_plain_one(steps: int) -> None:
    case = Case(length=14, steps=steps)
    accelerator, model, optimizer, loader = prepared(case)
    plain, (x, y, _) = make_model(), make_data(case).tensors
    of_plain = sgd(plain)
    for inputs, targets, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, inputs, targets).mean())
            accelerator.clip_grad_value_(model.parameters(), 1e-4)
            optimizer.step()
            optimizer.zero_grad()
    for window in case.windows():
        samples = list(chain(*window))
        of_plain.zero_grad()
        sample_losses(plain, x[samples], y[samples]).mean().backward()
        nn.utils.clip_grad_value_(plain.parameters(), 1e-4)
        of_plain.step()
    assert_close(flat(model), flat(plain))


def test_clipping_takes_one_tensor_and_other_norms() -> None:
    accelerator, model, _, loader = prepared(Case())
    plain = make_model()
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        norm = accelerator.clip_grad_norm_(model[0].weight, 1e-5, norm_type=1)
    sample_losses(plain, x, y).mean().backward()
    assert norm is not None
    assert_close(norm, nn.utils.clip_grad_norm_(plain[0].weight, 1e-5, norm_type=1))
    assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_clipping_strangers_is_refused() -> None:
    accelerator, *_ = prepared(Case())
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(StepError, match="clipping got 4 parameters, none of which a prepared optimizer holds"):
            clip(make_model().parameters(), 1.0)


@pytest.mark.parametrize("bound", [-1.0, float("nan"), "1", None])
def test_a_bound_that_clips_nothing_or_turns_gradients_is_refused(bound: Any) -> None:
    accelerator, model, _, loader = prepared(Case())
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        with pytest.raises(StepError, match=rf"max_norm is {bound!r}; expected a number >= 0"):
            accelerator.clip_grad_norm_(model.parameters(), bound)
        with pytest.raises(StepError, match=rf"clip_value is {bound!r}; expected a number >= 0"):
            accelerator.clip_grad_value_(model.parameters(), bound)
        assert accelerator.clip_grad_norm_(model.parameters(), float("inf")) is not None


# -- entering and leaving --------------------------------------------------------------------------------------


def test_a_model_that_was_not_prepared_is_refused() -> None:
    accelerator, *_ = prepared(Case())
    for stranger in (make_model(), prepared(Case())[1]):
        with pytest.raises(StepError, match="Sequential was not prepared by this Accelerator"):
            accelerator.accumulate(stranger)


def test_the_users_own_model_is_refused() -> None:
    accelerator, model = Accelerator("cpu"), make_model()
    accelerator.prepare(model)
    with pytest.raises(StepError, match=r"Use the model that prepare\(\) returned"):
        accelerator.accumulate(model)


def test_a_list_of_models_is_refused() -> None:
    accelerator, model, *_ = prepared(Case())
    with pytest.raises(StepError, match=r"list was not prepared .* accumulate\(first, second\)"):
        accelerator.accumulate([model])


def test_nesting_is_refused() -> None:
    accelerator, model, _, _ = prepared(Case())
    with accelerator.accumulate(model), pytest.raises(StepError, match="inside another accumulate"):
        accelerator.accumulate(model).__enter__()


def test_preparing_inside_an_open_window_is_refused() -> None:
    accelerator, model, optimizer, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    step(accelerator, model, optimizer, x, y)
    with pytest.raises(StepError, match=r"added inside an open accumulation window"):
        accelerator.prepare(nn.Linear(2, 2))


@pytest.mark.parametrize("named", [True, False])
def test_naming_no_model_names_all(named: bool) -> None:
    case = Case(length=9, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(*([model] if named else [])):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case))


def test_an_exception_drops_its_window(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(length=12, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        try:
            with accelerator.accumulate(model):
                accelerator.backward(sample_losses(model, x, y).mean())
                if number == 1:
                    raise ValueError("bad batch")
                optimizer.step()
                optimizer.zero_grad()
        except ValueError:
            assert all(parameter.grad is None for parameter in model.parameters())
    assert "dropped the gradients of 1 earlier micro-batches" in caplog.text
    assert_close(flat(model), train_plain(case, [[4, 5, 6, 7], [8, 9, 10, 11]]))


def train_with_an_exception(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        with contextlib.suppress(ValueError), accelerator.accumulate(model):
            loss = sample_losses(model, x, y).mean()
            if number == 1:
                raise ValueError("bad batch")
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


def test_an_exception_on_all_ranks_drops_its_window(ranks: RankPool) -> None:
    case = Case(length=24, world=2, steps=2)
    for weights in ranks(train_with_an_exception, case):
        assert_close(weights, train_plain(case, [[*range(8, 16)], [*range(16, 24)]]))
