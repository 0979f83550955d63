"""Where the parameters of a model are born: on the device that will train it, in the dtype asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .deferred_init import mark_empty
from .recording import OVERWRITING


@contextmanager
def born_on(device: torch.device, *, empty: bool) -> Iterator[None]:
    """Make tensors on `device` in this block; with `empty`, parameters hold NaN and nothing is drawn for them."""
    if not empty:
        with device:
            yield
        return
    skipping = _WithoutInit()

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            mark_empty(parameter)
            skipping.note(parameter)

    handle = nn.modules.module.register_module_parameter_registration_hook(note)
    try:
        with device, skipping:
            yield
    finally:
        handle.remove()


class _WithoutInit(TorchDispatchMode):
    """Passes over what overwrites a parameter."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `recording.Recorder`

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._parameters: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again

    def note(self, parameter: torch.Tensor) -> None:
        """Pass over writes to this one from now on."""
        self._parameters[parameter.untyped_storage()._cdata] = parameter.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OVERWRITING and args[0].untyped_storage()._cdata in self._parameters:
            return args[0]
        return func(*args, **(kwargs or {}))
