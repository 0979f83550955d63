"""More strategies that break one promise each: of where models begin, and of what batches are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from strategies import CPU, Precision, World

# --- beginnings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawsAgain(CPU):
    """Initialises at prepare, module by module: what the constructor wrote afterwards is lost."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        return model


@dataclass(frozen=True)
class KeepsGradients(CPU):
    """Keeps the gradients of open micro-batches beside `.grad`, and forgets none after an exception."""

    kept: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        yield
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                self.kept[id(parameter)] = self.kept.get(id(parameter), 0) + parameter.grad
                parameter.grad = None

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            for parameter in model.parameters():
                if parameter.grad is not None and id(parameter) in self.kept:
                    parameter.grad += self.kept.pop(id(parameter))


# --- data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropsTheLastBatch(CPU):
    """Reads one batch ahead, and forgets the one it holds at the end."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        held = next(batches, None)
        for batch in batches:
            yield held
            held = batch


@dataclass(frozen=True)
class SwallowsExceptions(CPU):
    """A failing dataset ends the epoch early."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        try:
            yield from batches
        except Exception:
            return
