"""Clipping by torch's own function, where gradients are not those of the step, is an error and not another number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerator import Accelerator
from oracle import flat, make_model
from rank_pool import RankPool
from strategies import StepError

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, X.sum(1), strict=True))


def by_torch(accelerator: Accelerator, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.001)


def by_torch_where_complete(accelerator: Accelerator, model: nn.Module) -> None:
    if accelerator.sync_gradients:
        nn.utils.clip_grad_norm_(model.parameters(), 0.001)


def by_torch_after_ours(accelerator: Accelerator, model: nn.Module) -> None:
    if accelerator.clip_grad_norm_(model.parameters(), float("inf")) is not None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.001)


def by_ours(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.clip_grad_norm_(model.parameters(), 0.001)


def mask(accelerator: Accelerator, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.grad is not None:
            parameter.grad.mul_(1.0)  # of some


def train(
    change: Callable[[Accelerator, nn.Module], None],
    strategy: str = "cpu",
    precision: str = "no",
    steps: int = 1,
    weight: float | None = None,
    stream: bool = False,
) -> torch.Tensor:
    accelerator = Accelerator(strategy, mixed_precision=precision, gradient_accumulation_steps=steps)  # type: ignore[arg-type]
    model: Any = make_model(torch.float32)
    data: Any = Stream() if stream else TensorDataset(X, X.sum(1))
    size = 2 // accelerator.num_processes
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=size)
    )
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = 1e-5 * (model(x).squeeze(1) - y).square().mean()  # float16 overflows at no step
            accelerator.backward(loss, weight=weight)
            change(accelerator, model)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return flat(model)


WRONG: dict[str, dict[str, Any]] = {
    "float16": {"precision": "fp16"},
    "an open window": {"steps": 2},
    "weights": {"weight": 3.0, "steps": 2},
    "a stream": {"stream": True, "steps": 2},
}


@pytest.mark.parametrize("name", WRONG)
def test_clipping_what_is_not_the_gradient_of_the_step_is_an_error(name: str) -> None:
    with pytest.raises(StepError, match=r"all gradients were changed in place .* Call accelerator.clip_grad_norm_"):
        train(by_torch, **WRONG[name])


def test_it_is_an_error_on_several_ranks(ranks: RankPool) -> None:
    with pytest.raises(StepError, match="still to be divided"):
        ranks(train, by_torch, "ddp", "fp16")


def test_where_gradients_are_those_of_the_step_torch_may_clip_them() -> None:
    expected = train(by_ours)
    assert torch.equal(train(by_torch), expected)
    for name, how in WRONG.items():
        expected = train(by_ours, **how)
        torch.testing.assert_close(train(by_torch_after_ours, **how), expected, msg=name)
    torch.testing.assert_close(train(by_torch_where_complete, steps=2), train(by_ours, steps=2))


@pytest.mark.parametrize("name", WRONG)
def test_a_change_of_some_gradients_is_not_looked_at(name: str) -> None:
    assert torch.equal(train(mask, **WRONG[name]), train(lambda accelerator, model: None, **WRONG[name]))


def test_a_change_of_the_only_gradient_may_be_one_of_some_rows() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    words = nn.Embedding(8, 3)
    model, optimizer = accelerator.prepare(words, torch.optim.SGD(words.parameters(), lr=0.1))
    before = words.weight.detach().clone()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.arange(8)).square().mean())
            assert words.weight.grad is not None
            words.weight.grad[0].zero_()  # it stays as it is
            optimizer.step()
    assert torch.equal(words.weight[0], before[0])
    assert not torch.equal(words.weight[1], before[1])


def test_gradients_of_a_batch_that_was_not_stepped_on_may_be_zeroed() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16")
    net: Any = make_model(torch.float32)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for number in range(3):
        optimizer.zero_grad(set_to_none=False)
        accelerator.backward(1e-5 * model(X).float().square().mean())
        if number != 1:  # as where a loss is not finite
            optimizer.step()
    assert accelerator._accumulation.steps_taken == 2
