"""The prepared optimizer against the plain one: what it does, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import PrepareError, StepError

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}
CASE = Case(length=6, batch_size=3)


def batch() -> tuple[Tensor, Tensor]:
    x, y, _ = make_data(CASE).tensors
    return x, y


def prepared(
    make: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["sgd"], **settings: Any
) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    accelerator = Accelerator("cpu", **settings)
    model = make_model()
    return accelerator, *accelerator.prepare(model, make(model.parameters()))


def train_step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = batch()
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        optimizer.zero_grad()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sample_losses(model, *batch()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_kind_steps_as_the_plain_one(kind: str) -> None:
    accelerator, model, optimizer = prepared(OPTIMIZERS[kind])
    plain = make_model()
    plain_optimizer = OPTIMIZERS[kind](plain.parameters())
    assert isinstance(optimizer, type(plain_optimizer))
    for _ in range(3):
        train_step(accelerator, model, optimizer)
        plain_step(plain, plain_optimizer)
    assert torch.equal(flat(model), flat(plain))
    assert repr(optimizer) == repr(plain_optimizer)


def test_it_may_be_built_from_the_prepared_model() -> None:
    accelerator = Accelerator("cpu")
    model = accelerator.prepare(make_model())
    optimizer = accelerator.prepare(OPTIMIZERS["sgd"](model.parameters()))
    plain = make_model()
    train_step(accelerator, model, optimizer)
    plain_step(plain, OPTIMIZERS["sgd"](plain.parameters()))
    assert torch.equal(flat(model), flat(plain))


def test_hooks_run_once_per_step_taken() -> None:
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=3)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    loader = accelerator.prepare(DataLoader(make_data(Case(length=10)), batch_size=2))
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert called == ["before", "after"] * 2


def test_state_goes_through_a_state_dict() -> None:
    accelerator, model, optimizer = prepared()
    plain = make_model()
    plain_optimizer = OPTIMIZERS["sgd"](plain.parameters())
    train_step(accelerator, model, optimizer)
    plain.load_state_dict(model.state_dict())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        train_step(accelerator, model, optimizer)
        plain_step(plain, plain_optimizer)
    assert torch.equal(flat(model), flat(plain))
    state = copy.deepcopy(plain_optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.01
    optimizer.load_state_dict(copy.deepcopy(state))
    plain_optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01
    train_step(accelerator, model, optimizer)
    plain_step(plain, plain_optimizer)
    assert torch.equal(flat(model), flat(plain))


def test_state_made_before_prepare_is_kept() -> None:
    accelerator, model, plain = Accelerator("cpu"), make_model(), make_model()
    optimizer, plain_optimizer = (OPTIMIZERS["adamw"](each.parameters()) for each in (model, plain))
    plain_step(model, optimizer)
    plain_step(plain, plain_optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_step(accelerator, model, optimizer)
    plain_step(plain, plain_optimizer)
    assert torch.equal(flat(model), flat(plain))


def test_copies_are_of_the_users_class() -> None:
    accelerator, model, optimizer = prepared()
    train_step(accelerator, model, optimizer)
    for made in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer), copy.copy(optimizer)):
        assert type(made) is torch.optim.SGD
        momentum = [state["momentum_buffer"] for state in made.state.values()]
        assert len(momentum) == 4
        assert torch.equal(momentum[0], optimizer.state[next(model.parameters())]["momentum_buffer"])


# -- closures --------------------------------------------------------------------------------------------------


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4)


@pytest.mark.parametrize("inside", [True, False])
def test_lbfgs_steps_as_the_plain_one(inside: bool) -> None:
    accelerator, model, optimizer = prepared(lbfgs)
    plain = make_model()
    plain_optimizer = lbfgs(plain.parameters())
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1000 * sample_losses(model, x, y).mean()
        accelerator.backward(loss)
        return loss

    def plain_closure() -> Tensor:
        plain_optimizer.zero_grad()
        loss = 1000 * sample_losses(plain, x, y).mean()
        loss.backward()
        return loss

    for _ in range(3):
        with accelerator.accumulate(model) if inside else nullcontext():
            loss = optimizer.step(closure)
        assert torch.equal(loss, plain_optimizer.step(plain_closure))
    assert torch.equal(flat(model), flat(plain))


def step_with_closure(strategy: str, precision: str, steps: int) -> None:
    accelerator = Accelerator(strategy, mixed_precision=precision, gradient_accumulation_steps=steps)  # type: ignore[arg-type]
    model = make_model()
    model, optimizer = accelerator.prepare(model, lbfgs(model.parameters()))
    with accelerator.accumulate(model):
        optimizer.step(lambda: 0.0)


def test_a_closure_is_refused_on_two_processes(ranks: RankPool) -> None:
    for error in ranks(step_with_closure, "ddp", "no", 1, return_exceptions=True):
        assert isinstance(error, StepError)
        assert "LBFGS.step got a closure, but on 2 processes" in str(error)


@pytest.mark.parametrize(
    ("precision", "steps", "reason"), [("no", 2, "several micro-batches"), ("fp16", 1, "float16 loss scale")]
)
def test_a_closure_is_refused_where_it_cannot_be_right(precision: str, steps: int, reason: str) -> None:
    with pytest.raises(StepError, match=f"got a closure, but .*{reason}.* Step without a closure"):
        step_with_closure("cpu", precision, steps)


# -- groups and gradients --------------------------------------------------------------------------------------


def test_a_group_may_be_added() -> None:
    accelerator, model, plain = Accelerator("cpu"), make_model(), make_model()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS["sgd"](model[0].parameters()))
    plain_optimizer = OPTIMIZERS["sgd"](plain[0].parameters())
    optimizer.add_param_group({"params": model[2].weight, "lr": 0.3})
    optimizer.add_param_group({"params": iter([model[2].bias]), "lr": 0.2})
    plain_optimizer.add_param_group({"params": plain[2].weight, "lr": 0.3})
    plain_optimizer.add_param_group({"params": [plain[2].bias], "lr": 0.2})
    train_step(accelerator, model, optimizer)
    plain_step(plain, plain_optimizer)
    assert torch.equal(flat(model), flat(plain))


def test_a_group_of_strangers_is_refused() -> None:
    _, _, optimizer = prepared()
    with pytest.raises(PrepareError, match=r"SGD holds 1 of 1 parameters that belong to no prepared model .*\(9,\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(9))]})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_no_prepared_model_are_refused() -> None:
    model, other = make_model(), nn.Linear(5, 6)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(PrepareError, match=r"SGD holds 2 of 6 parameters .* \(shapes \(6, 5\), \(6,\)\)"):
        Accelerator("cpu").prepare(model, optimizer)


def test_zeroing_is_held_while_a_window_is_open() -> None:
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=2)
    x, y = batch()
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        optimizer.zero_grad()
    held = model[0].weight.grad.clone()
    optimizer.zero_grad()
    with accelerator.accumulate(model):
        optimizer.zero_grad()
        assert torch.equal(model[0].weight.grad, held)


def test_zeroing_after_the_last_backward_discards_the_window() -> None:
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=2)
    before, (x, y) = flat(model), batch()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            if accelerator.sync_gradients:  # as a loop that found a loss of nan
                optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(flat(model), before)


def test_zeroing_may_leave_zeros() -> None:
    accelerator, model, optimizer = prepared()
    x, y = batch()
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_gradients_of_loss_backward_are_refused() -> None:
    _, model, optimizer = prepared()
    sample_losses(model, *batch()).mean().backward()
    with pytest.raises(StepError, match=r"SGD\.step found gradients that no accelerator\.backward\(loss\) made"):
        optimizer.step()


@pytest.mark.parametrize("num_windows_before", [0, 1])
def test_gradients_of_loss_backward_are_refused_inside_a_window(num_windows_before: int) -> None:
    accelerator, model, optimizer = prepared()
    for _ in range(num_windows_before):
        train_step(accelerator, model, optimizer)
    with accelerator.accumulate(model):
        sample_losses(model, *batch()).mean().backward()
        with pytest.raises(StepError, match=r"Call accelerator\.backward\(loss\) instead of loss\.backward\(\)"):
            optimizer.step()


# -- several models --------------------------------------------------------------------------------------------


def test_stepping_inside_a_window_of_another_model_is_refused() -> None:
    accelerator, _, optimizer = prepared()
    second = make_model(seed=8)
    second, _ = accelerator.prepare(second, OPTIMIZERS["sgd"](second.parameters()))
    with accelerator.accumulate(second):
        accelerator.backward(sample_losses(second, *batch()).mean())
        with pytest.raises(StepError, match=r"SGD of Sequential stepped inside an accumulate\(\) that does not name"):
            optimizer.step()


def test_one_optimizer_trains_two_models() -> None:
    accelerator = Accelerator("cpu")
    models, plain = [make_model(seed=seed) for seed in (1, 2)], [make_model(seed=seed) for seed in (1, 2)]
    optimizer, plain_optimizer = (
        OPTIMIZERS["sgd"]([parameter for model in pair for parameter in model.parameters()]) for pair in (models, plain)
    )
    first, second, optimizer = accelerator.prepare(*models, optimizer)
    x, y = batch()
    for _ in range(2):
        with accelerator.accumulate(first, second):
            accelerator.backward(sample_losses(first, x, y).mean() + sample_losses(second, x, 2 * y).mean())
            optimizer.step()
            optimizer.zero_grad()
        (sample_losses(plain[0], x, y).mean() + sample_losses(plain[1], x, 2 * y).mean()).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert torch.equal(flat(first), flat(plain[0]))
    assert torch.equal(flat(second), flat(plain[1]))


def test_naming_one_of_two_models_of_an_optimizer_is_refused() -> None:
    accelerator = Accelerator("cpu")
    models = [make_model(), nn.Linear(3, 1)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    first, _, _ = accelerator.prepare(*models, OPTIMIZERS["sgd"](parameters))
    with pytest.raises(StepError, match=r"SGD also holds parameters of Linear, which accumulate\(\) does not name"):
        accelerator.accumulate(first)
