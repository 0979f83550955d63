"""Rules on parameters: the ones that are computed with are the user's, the optimizer's, and alike on all ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import collectives
from ...base import Strategy
from ...precision import Precision
from ..loop import Loop, weights_of
from ..oracle import Net, Weights, mean_loss
from ..rule import Broken, rule


@rule()
def unwrap_returns_the_module(strategy: Strategy) -> None:
    """`unwrap` gives back the very module that was wrapped, with its parameters under their own names.

    Optimizers are re-pointed by these names, the user's own attributes are looked up there, and what is saved
    is keyed by them. Change the module in place in `wrap`, or keep it inside the wrapper and return it from `unwrap`.
    """
    with Loop(strategy) as loop:
        net = Net(0).to(loop.dtype)
        before = [name for name, _ in net.named_parameters()]
        inner = strategy.unwrap(strategy.wrap(net, loop.world, Precision()))
        if inner is not net:
            what = f"another {type(inner).__name__}" if type(inner) is Net else f"a {type(inner).__name__}"
            raise Broken(
                f"unwrap(wrap(model)) is {what}",
                expected="the same object that was given to wrap",
                advice="Return the user's module itself: not the wrapper around it, and not a copy.",
            )
        after = [name for name, _ in inner.named_parameters()]
        if after != before:
            raise Broken(
                f"after wrap, the parameters are named {', '.join(after)}",
                expected=", ".join(before),
                advice="Parameters may be replaced, but each keeps its name.",
            )


@rule()
def live_parameters(strategy: Strategy) -> None:
    """After `prepare`, the optimizer holds the parameters that forward and backward use, and goes on holding them.

    An optimizer that holds others trains nothing and says nothing. Replace parameters only inside `wrap` (not at
    the first forward), in the module that `unwrap` returns.
    """
    with Loop(strategy) as loop:
        model, optimizer = loop.model_and_optimizer()
        _, loader = loop.loader(2 * loop.world.size)
        _check_held(model, optimizer, "after prepare")
        for batch in loader:
            with loop.accumulate(model):
                loop.backward(mean_loss(model(x=batch["x"]), batch))
                _check_held(model, optimizer, "after the first forward and backward")
                loop.finish_gradients(model)
                without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
                if without:
                    raise Broken(
                        f"after backward and reduce_gradients, {', '.join(without)} of the optimizer have no gradient",
                        expected="a gradient for each: the model has no unused parameter",
                        advice="unwrap() must return the module whose parameters forward computes with.",
                    )


@rule()
def step_changes_weights(strategy: Strategy) -> None:
    """An optimizer step changes every trainable weight, and the next forward computes with the changed ones.

    Otherwise the loss stays where it is, without an error. A strategy that keeps weights elsewhere (on another
    device, in a flat buffer, in another dtype) has to let the optimizer update those.
    """
    with Loop(strategy) as loop:
        model, optimizer = loop.model_and_optimizer()
        samples, loader = loop.loader(2 * loop.world.size)
        x = samples.x.to(loop.world.device)
        with torch.no_grad():
            output_before = model(x).cpu()
        (step,) = loop.train(model, optimizer, loader)
        with torch.no_grad():
            output_after = model(x).cpu()
        after_forward = weights_of(model)
        still = [name for name, weight in step.before.items() if torch.equal(weight, step.after[name])]
        if still:
            raise Broken(
                f"{', '.join(still)} did not change in an optimizer step",
                expected="every trainable weight to move against its gradient",
                advice="Look at unwrap() and reduce_gradients(): the optimizer's gradients were zero or missing.",
            )
        if any(not torch.equal(after_forward[name], weight) for name, weight in step.after.items()):
            raise Broken(
                "the weights changed once more in the forward after the step",
                expected="forward to leave the weights as they are",
                advice="If forward brings weights from elsewhere, they must be the ones that the optimizer updates.",
            )
        if torch.equal(output_before, output_after):
            raise Broken(
                "the model's output for the same input did not change in an optimizer step",
                expected="forward to compute with the updated weights",
                advice="Forward uses a copy of the weights that was made before the step.",
            )


@rule(min_processes=2)
def replicas_agree(strategy: Strategy) -> None:
    """All ranks see the same weights: after `wrap`, whatever each rank started with, and after every step.

    A user may seed each rank differently; ranks that start apart stay apart, and the average of their gradients
    is the gradient of no model. Send rank 0's weights to the others in `wrap`, and give all ranks one gradient.
    """
    with Loop(strategy, steps=2) as loop:
        model, optimizer = loop.model_and_optimizer(seed=loop.world.rank)
        _, loader = loop.loader(8 * loop.world.size)
        _check_agreement(
            loop,
            weights_of(model),
            "after prepare, of models that were initialised differently on each rank",
            "Broadcast rank 0's parameters and buffers in wrap().",
        )
        for number, step in enumerate(loop.train(model, optimizer, loader), start=1):
            _check_agreement(
                loop,
                step.after,
                f"after optimizer step {number}",
                "Every rank must step with the same gradient: the mean over ranks.",
            )


def _check_held(model: nn.Module, optimizer: Optimizer, when: str) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stale = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if stale:
        raise Broken(
            f"{when}, the model's {', '.join(stale)} are not the tensors that the optimizer holds: it is stale",
            expected="the optimizer to hold every parameter of the module that unwrap() returns",
            advice="Replace parameters inside wrap() and nowhere else: optimizers are re-pointed right after it.",
        )


def _check_agreement(loop: Loop, weights: Weights, when: str, advice: str) -> None:
    flat: Tensor = torch.cat([weights[name].reshape(-1) for name in sorted(weights)])
    mine = flat.to(loop.dtype).to(loop.world.device)[None]  # (1, weights)
    everyone = collectives.gather(mine, loop.world).cpu()  # (ranks, weights)
    for rank, (first, second) in enumerate(pairwise(everyone), start=1):
        distance = float((second - first).abs().max())
        if distance > loop.tolerance * float(first.abs().max()):
            raise Broken(
                f"{when}, the weights of rank {rank} are {distance:.2g} away from those of rank {rank - 1}",
                expected="the same weights on all ranks",
                advice=advice,
            )
