"""Scale the loss of float16 training, with one verdict on overflow for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .process_group import named_failures
from .shards import is_sharded, local
from .world import World


class LossScaler:
    """One loss scale for the gradients of one window (Micikevicius et al. 2018, arXiv:1710.03740).

    A `torch.amp.GradScaler` does the arithmetic. Around it: the finite check is agreed over ranks, and the
    scale changes only between windows, so that gradients summed in one window share one scale.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._scaler = torch.amp.GradScaler(world.device.type)
        self._overflowed: dict[Optimizer, Tensor] = {}  # the verdict on each optimizer's window
        self._local_parts: dict[Optimizer, Any] = {}  # GradScaler knows them by identity until its update

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the scale, for backward."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Divide the optimizer's `gradients` by the scale, in place, and note whether any is not finite.

        Collective: the verdict is true on all ranks if it is true on one.
        """
        holder: Any = optimizer
        if any(is_sharded(gradient) for gradient in gradients):  # GradScaler refuses them beside whole ones
            holder = self._local_parts[optimizer] = _holder_of([local(gradient) for gradient in gradients])
        if gradients:
            self._scaler.unscale_(holder)
        # The public GradScaler tells its verdict only through a lower scale after update(), which costs a second
        # wait for the device and comes too late for the scheduler of the same iteration.
        found = self._scaler._per_optimizer_states[id(holder)]["found_inf_per_device"]
        verdict = sum(found.values(), torch.zeros((), device=self._world.device))
        if self._world.size > 1:
            with named_failures(self._world):
                dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        found[self._world.device] = verdict  # for update(), which all ranks do alike
        self._overflowed[optimizer] = verdict

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer` if its gradients are finite, on all ranks. Returns whether it stepped."""
        if self._overflowed[optimizer].item():
            return False
        optimizer.step()
        return True

    def begin_window(self) -> None:
        """Take the new scale, if the last window's gradients were looked at."""
        if self._overflowed:
            self._scaler.update()
            self._overflowed.clear()
            self._local_parts.clear()

    @property
    def value(self) -> float:
        """The scale that the next backward uses. Waits for the device."""
        self.begin_window()
        return self._scaler.get_scale()

    @property
    def current(self) -> float:
        """The scale of the window that is open, or was last. Waits for the device."""
        return self._scaler.get_scale()

    def state_dict(self) -> dict[str, float | int]:
        """The scale and its growth, between windows."""
        self.begin_window()
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue with the scale and growth of `state`."""
        self._overflowed.clear()
        self._scaler.load_state_dict(state)


def _holder_of(gradients: Sequence[Tensor]) -> Any:
    """What GradScaler takes for an optimizer: parameters, here stand-ins, with these gradients."""
    parameters = [gradient.detach() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return SimpleNamespace(param_groups=[{"params": parameters}])
