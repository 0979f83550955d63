"""Where the parameters of a model are born: on the device that will train it, in the dtype asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .deferred_init import OVERWRITING, mark_empty


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
            skipping.parameters.add(parameter.untyped_storage()._cdata)

    handle = nn.modules.module.register_module_parameter_registration_hook(note)
    try:
        with device, skipping:
            yield
    finally:
        handle.remove()


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Make floating-point tensors of `dtype` in this block, where nothing else is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _WithoutInit(TorchDispatchMode):
    """Passes over what overwrites a parameter."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.parameters: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OVERWRITING and args[0].untyped_storage()._cdata in self.parameters:
            return args[0]
        return func(*args, **(kwargs or {}))
