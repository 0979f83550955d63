"""Statistics of activations and gradients, computed where the tensors are and never waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.accumulation import Accumulation
from strategies.observer import Observer
from strategies.prepared.model import ModelLink
from strategies.prepared.optimizer import OptimizerLink
from strategies.process_group import named_failures
from strategies.shards import local
from strategies.tree import iterate_tensors
from strategies.window import Window

from .module_trace import refuse_compiled

STATISTICS = ("mean", "std", "max_abs", "zeros")
_WIDTH = 5  # count, sum, sum of squares, largest magnitude, zeros


class Watch(Observer):
    """Gives `log` statistics of one model for each step that `every` divides, on the main process.

    Activations are the outputs of modules without children, in the micro-batch that closes the window; gradients
    are those of the step, before clipping. Both are of all ranks together: two small all-reduces for each such step.
    """

    def __init__(
        self, accumulation: Accumulation, link: ModelLink, every: int, log: Callable[[Mapping[str, Any]], None]
    ) -> None:
        refuse_compiled(link.original, "watch()")
        self._accumulation = accumulation
        self._link = link
        self._every = every
        self._log = log
        self._is_open = False
        self._moments: dict[str, Tensor] = {}
        self._names = []
        for name, module in link.original.named_modules():
            if not any(True for _ in module.children()):
                key = f"activation/{name or link.name}"
                self._names.append(key)
                module.register_forward_hook(self._hook(key))
        self._names += [f"gradient/{name}" for name, _ in self._parameters()]

    def micro_batch_begun(self, window: Window) -> None:
        """Listen if this micro-batch ends in a step whose number `every` divides."""
        steps = max((optimizer.num_steps for optimizer in self._link.optimizers), default=0)
        self._is_open = window.closing and self._link in window.models and (steps + 1) % self._every == 0

    def gradients_ready(self, optimizer: OptimizerLink) -> None:
        """Add the gradients, put ranks together, and hand it all over."""
        if not self._is_open or self._link not in optimizer.models:
            return
        self._is_open = False
        for name, parameter in self._parameters():
            if parameter.grad is not None:
                self._add(f"gradient/{name}", local(parameter.grad))
        seen, world = self._moments, self._accumulation.world
        self._moments = {}
        nothing = torch.zeros(_WIDTH, dtype=_dtype(world.device), device=world.device)
        together = torch.stack([seen.get(name, nothing) for name in self._names])  # the same rows on every rank
        if world.size > 1:
            largest = together[:, 3].contiguous()
            with named_failures(world):
                dist.all_reduce(together)
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            together[:, 3] = largest
        if world.is_main:
            count, total, squares, largest, zeros = together.unbind(1)
            mean = total / count
            std = (squares / count - mean.square()).clamp(min=0).sqrt()
            rows = torch.stack([mean, std, largest, zeros / count], dim=1)
            self._log(
                {
                    f"{name}/{statistic}": rows[row, column]
                    for row, name in enumerate(self._names)
                    if name in seen
                    for column, statistic in enumerate(STATISTICS)
                }
            )

    def raised(self, error: BaseException) -> None:
        """Forget the micro-batch that an exception ended."""
        self._is_open = False
        self._moments = {}

    def _parameters(self) -> list[tuple[str, Tensor]]:
        held = self._link.sharded_parameters or dict(self._link.original.named_parameters())
        return [(name, parameter) for name, parameter in held.items() if parameter.requires_grad]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._is_open and torch.is_grad_enabled():
                for tensor in iterate_tensors(output):
                    if tensor.is_floating_point():
                        self._add(name, local(tensor))

        return hook

    def _add(self, name: str, tensor: Tensor) -> None:
        """Count one more tensor among those of `name`."""
        values = tensor.detach().to(_dtype(tensor.device))
        if values.numel() == 0:
            return
        count = torch.full((), float(values.numel()), dtype=values.dtype, device=values.device)
        largest = values.abs().max()
        new = torch.stack([count, values.sum(), values.square().sum(), largest, (values == 0).sum().to(values.dtype)])
        new = new.to(self._accumulation.world.device)
        old = self._moments.get(name)
        if old is not None:
            largest = torch.maximum(old[3], new[3])
            new = old + new
            new[3] = largest
        self._moments[name] = new


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # a variance is a difference of large numbers
