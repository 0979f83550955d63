"""Rules on mixed precision: low where it was asked for, full elsewhere, and one verdict on overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...base import Strategy
from ...errors import ConfigurationError
from ..loop import Loop, Step, weights_of
from ..oracle import compare, gradient_of, mean_loss
from ..rule import Broken, rule


@rule()
def autocast_dtype(strategy: Strategy) -> str | None:
    """Under "bf16", forward computes and answers in bfloat16; parameters and gradients keep their own dtype.

    A silent return to float32 costs half of the speed, and master weights in bfloat16 lose most updates. The
    precision may come from `autocast` or from `wrap`. A strategy that cannot do it raises `ConfigurationError`.
    """
    try:
        with Loop(strategy, precision="bf16") as loop:
            model, optimizer = loop.model_and_optimizer()
            _check_dtypes(model, optimizer, "after prepare")
            samples, loader = loop.loader(2 * loop.world.size)
            before = weights_of(model)
            for batch in loader:
                with loop.accumulate(model):
                    output = model(x=batch["x"])
                    _check_output(output, loop.world.device)
                    loop.backward(mean_loss(output.float(), batch))
                    loop.finish_gradients(model)
                    _check_dtypes(model, optimizer, "after backward")
                    optimizer.step()
            used = Step(before, weights_of(model), None).gradient
            expected = gradient_of(before, samples, range(len(samples)))
            where = 'at an optimizer step under "bf16"'
            compare(used, expected, tolerance=loop.tolerance, where=where, num_ranks=loop.world.size)
    except ConfigurationError as refusal:
        return f"refuses bf16: {refusal}"
    return None


@rule()
def overflow_skips_everywhere(strategy: Strategy) -> str | None:
    """Under "fp16", an overflow on one rank makes every rank skip that step, and none after it.

    Ranks that disagree on it part for ever. The finite check runs after `reduce_gradients`, so infinities must
    come through it as they are. A strategy that cannot do float16 raises `ConfigurationError`.
    """
    try:
        with Loop(strategy, precision="fp16", steps=2) as loop:
            model, optimizer = loop.model_and_optimizer()
            samples, loader = loop.loader(3 * 2 * 2 * loop.world.size)
            before = weights_of(model)
            for number, batch in enumerate(loader):
                window = number // 2
                with loop.accumulate(model):
                    loss = mean_loss(model(x=batch["x"]).float(), batch) * 1e-2  # within float16's range when scaled
                    if number == 2 and loop.world.rank == loop.world.size - 1:
                        loss = loss * float("inf")
                    loop.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if loop.closes_window:
                    step = Step(before, weights_of(model), None)
                    _check_skipped(loop, step, window, must_skip=window == 1)
                    if window != 1:
                        indices = range(window * 4 * loop.world.size, (window + 1) * 4 * loop.world.size)
                        expected = gradient_of(before, samples, indices)
                        expected = {name: tensor * 1e-2 for name, tensor in expected.items()}
                        where = f'in window {window + 1} under "fp16"'
                        compare(
                            step.gradient, expected, tolerance=loop.tolerance, where=where, num_ranks=loop.world.size
                        )
                    before = step.after
    except ConfigurationError as refusal:
        return f"refuses fp16: {refusal}"
    return None


def _check_output(output: Any, device: torch.device) -> None:
    if output.dtype != torch.bfloat16:
        raise Broken(
            f'under "bf16", the output of a linear layer is {_name(output.dtype)}',
            expected="bfloat16: computed in it, and left in it",
            advice="autocast() must return torch.autocast(world.device.type, dtype=precision.dtype) or what comes to "
            "the same, or wrap() must cast.",
        )
    if torch.is_autocast_enabled(device.type):
        raise Broken(
            "autocast is still on after forward",
            expected="autocast for forward alone",
            advice="autocast() must return a context that ends; setup() and wrap() must not enter one.",
        )


def _check_dtypes(model: nn.Module, optimizer: Optimizer, when: str) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in [*held, *model.parameters()]:
        for what, tensor in (("a parameter", parameter), ("a gradient", parameter.grad)):
            if tensor is not None and tensor.dtype != torch.float32:
                raise Broken(
                    f'under "bf16", {what} is {_name(tensor.dtype)} {when}',
                    expected="float32, as the user made it",
                    advice="Do not cast the model itself: cast copies for forward, as autocast does.",
                )


def _check_skipped(loop: Loop, step: Step, window: int, *, must_skip: bool) -> None:
    changed = any(not torch.equal(step.before[name], weight) for name, weight in step.after.items())
    if must_skip and (changed or not loop.accumulation.step_was_skipped):
        raise Broken(
            f"rank {loop.world.rank} stepped although the gradients of rank {loop.world.size - 1} overflowed",
            expected="every rank to skip this optimizer step",
            advice="reduce_gradients() must pass infinities and NaN on, to every rank: do not clean or clip there.",
        )
    if not must_skip and not changed:
        raise Broken(
            f"rank {loop.world.rank} skipped the optimizer step of window {window + 1}, whose gradients are finite",
            expected="only the window that overflowed to be skipped",
            advice="Gradients of an earlier window, or an infinity kept in a buffer, were reduced again.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
