"""Scalars of a device as they are now, read when that costs no waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Later:
    """Values by name, some of them tensors of one element.

    Those of torch's current accelerator are copied to pinned memory without waiting; `read` waits for the copies, and
    may be called in another thread. Those of a device that torch has no events for (XLA) are held: `is_copied` is
    false, and `read` belongs in the loop's thread, after the step that computes them.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.is_copied = True
        self._ready: torch.Event | None = None
        device = next((value.device for value in self.values.values() if isinstance(value, Tensor)), None)
        if device is None:
            return
        if device.type == "cpu":
            self.values = _items(self.values)
            return
        current = torch.accelerator.current_accelerator()
        self.is_copied = current is not None and device.type == current.type
        for name, value in self.values.items():
            if isinstance(value, Tensor):
                value = value.detach()
                self.values[name] = value.to("cpu", non_blocking=True) if self.is_copied else value.clone()
        if self.is_copied:
            self._ready = torch.Event(device)
            self._ready.record()

    def read(self) -> dict[str, Any]:
        """The values, as numbers of the host."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        self.values = _items(self.values)
        return self.values


def _items(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
