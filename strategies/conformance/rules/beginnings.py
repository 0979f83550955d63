"""Rules on what comes before a window and after one that failed: the same numbers, and nothing left over."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from ...base import Strategy
from ...errors import StepError
from ...tree import move
from ..loop import Loop, weights_of
from ..oracle import LEARNING_RATE, Samples, compare, gradient_of, mean_loss
from ..rule import Broken, rule

SEED, STEPS = 11, 2


class Plain(nn.Module):
    """The network of the oracle, drawn from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.outer = nn.Linear(8, 4)
        nn.init.normal_(self.inner.weight, std=0.5)  # a second time, as many constructors do


@rule()
def init_context_keeps_numbers(strategy: Strategy) -> None:
    """A model built in `init_context` gets the numbers that plain construction from rank 0's seed gives.

    A strategy may put parameters elsewhere or make them later, each rank a part; it may not draw them in another
    order, or on every rank the same for another part.
    """
    with Loop(strategy) as loop:
        torch.manual_seed(SEED + loop.world.rank)
        with strategy.init_context(loop.world, empty=False):
            built = Plain()
        (model,) = loop.prepare(built)
        came = weights_of(model)
        torch.manual_seed(SEED)
        if loop.world.device.type != "cpu":
            return  # a device draws other numbers than the CPU
        expected = {name: parameter.detach().double() for name, parameter in Plain().named_parameters()}
        wrong = [name for name in expected if not torch.equal(came[name], expected[name])]
        if wrong:
            raise Broken(
                f"{', '.join(wrong)} have other numbers than in plain PyTorch with the same seed",
                expected="the same, bit for bit, whole or put together from all ranks",
                advice="Build on the device, or play the construction back from rank 0's generator, on whole tensors.",
            )


@rule()
def exceptions_leave_nothing(strategy: Strategy) -> str | None:
    """After an exception in the middle of a window, the next window's gradient is its own alone, or refused.

    The loop zeroes `.grad`; what a strategy keeps elsewhere (gradients that wait to be reduced, gathered parameters)
    it drops in `discard_gradients`.
    """
    with Loop(strategy, steps=STEPS) as loop:
        model, _ = loop.model_and_optimizer()
        optimizer = loop.accumulation.optimizers[-1]
        assert isinstance(optimizer.original, SGD)
        samples = Samples(2 * loop.world.size, loop.dtype)
        mine = slice(2 * loop.world.rank, 2 * loop.world.rank + 2)
        batch = move({"x": samples.x[mine], "y": samples.y[mine]}, loop.world.device)
        for in_micro_batch in range(STEPS):
            _fail_in(loop, model, batch, in_micro_batch)
        before = weights_of(model)
        for _ in range(STEPS):
            try:
                window = loop.accumulate(model).__enter__()
            except StepError as refusal:
                return f"refused: {refusal}"
            loop.backward(mean_loss(model(x=batch["x"]), batch))
            optimizer.step()
            window.__exit__(None, None, None)
        after = weights_of(model)
        came = {name: (before[name] - after[name]) / LEARNING_RATE for name in before}
        expected = gradient_of(before, samples, range(2 * loop.world.size))
        where = "in the window after two that ended in an exception"
        compare(came, expected, tolerance=loop.tolerance, where=where, num_ranks=loop.world.size)
    return None


def _fail_in(loop: Loop, model: nn.Module, batch: dict[str, torch.Tensor], failing: int) -> None:
    """A window whose micro-batch number `failing` ends in an exception, after its backward or before."""
    for index in range(failing + 1):
        try:
            with loop.accumulate(model):
                loss = mean_loss(model(x=batch["x"]), batch)
                if index == failing and failing:
                    raise _Failure
                loop.backward(loss)
                if index == failing:
                    raise _Failure
        except (_Failure, StepError):
            return


class _Failure(Exception):
    pass
