"""One process on one device: a CPU, a GPU, or whatever accelerator torch finds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .base import NOTHING, Strategy
from .errors import LaunchError
from .precision import Precision
from .process_group import pick_device, read_environment
from .transfer import to_device
from .world import World


@dataclass(frozen=True)
class SingleDevice(Strategy):
    """Train in one process on one device.

    `device`: `"auto"` (the machine's accelerator, or its CPU), `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, ...
    """

    single_process: ClassVar[bool] = True

    device: str = "auto"

    def setup(self) -> World:
        """Pick the device. Raises `LaunchError` in one of several processes: each would train alone."""
        placement = read_environment(os.environ)
        if placement.size > 1:
            raise LaunchError(
                f"{type(self).__name__} trains in one process, but {placement.size} were started. "
                "Use strategy='ddp' (or 'auto'), or start one process."
            )
        return World(device=pick_device(self.device, 0))

    def teardown(self, world: World) -> None:
        """Nothing was joined."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        """Move the model to the device."""
        return model.to(world.device)

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The model itself."""
        return wrapped

    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        """torch's autocast for the device."""
        return torch.autocast(world.device.type, dtype=precision.dtype)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """There is nobody to synchronise with."""
        return NOTHING

    def train_alone(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """It is alone."""
        return NOTHING

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        """There is nobody to reduce with."""

    def discard_gradients(self, wrapped: nn.Module) -> None:
        """Nothing is kept outside `.grad`."""

    def mark_step(self, world: World) -> None:
        """Operations run as they are called."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        """Move each batch to the device."""
        return to_device(batches, world.device)


@dataclass(frozen=True)
class CPU(SingleDevice):
    """Train in one process on the CPU."""

    device: str = "cpu"
