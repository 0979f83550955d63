"""Models built without memory for their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.deferred_init import record, recording_of
from strategies.errors import PrepareError
from strategies.recording import Recording, default_dtype

from .parts import check_dtype
from .words import unlike_accelerate

_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build models in this block with their parameters on the meta device: shapes and dtypes, no memory.

    Nothing is drawn for them, so it takes as long as running the constructor. Buffers have their numbers at the end
    of the block; with `include_buffers` they stay on the meta device too, and loading gives those that no checkpoint
    holds the numbers of the constructor. Random buffers wait for a checkpoint in either case. Tensors that the
    constructor makes on a device and fills with random numbers itself stay as they are.
    """
    modules: dict[int, nn.Module] = {}

    def note(module: nn.Module, name: str, item: object) -> None:
        modules[id(module)] = module
        if isinstance(item, nn.Module):
            modules[id(item)] = item

    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(note),
        hooks.register_module_buffer_registration_hook(note),
        hooks.register_module_module_registration_hook(note),
    ]
    try:
        with record(torch.device("cpu"), empty=True) as recording:
            yield
    finally:
        for handle in handles:
            handle.remove()
    known: dict[int, Tensor] = {}
    for module in modules.values():
        # Tensors that are no buffers, also in lists and dictionaries: nothing could ever fill them.
        plain = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        _make_real_within(plain, known, recording, set())
        vars(module).update(plain)
        if not include_buffers:
            _make_real(module._buffers, known, recording)


def fill_buffers(model: nn.Module) -> None:
    """Give buffers that are on the meta device the numbers of the constructor, if `init_empty_weights` saw it."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        _make_real(module._buffers, known)


def _make_real_within(item: Any, known: dict[int, Tensor], recording: Recording, seen: set[int]) -> None:
    """Replace the meta tensors in a list or dictionary, and in those within it, but for parameters."""
    if id(item) in seen:
        return
    seen.add(id(item))
    pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
    for key, value in pairs:
        if isinstance(value, list | dict):
            _make_real_within(value, known, recording, seen)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            real: dict[str, Tensor | None] = {"": value}
            _make_real(real, known, recording)
            if real[""] is not value:
                item[key] = real[""]


def _make_real(holder: dict[str, Tensor | None], known: dict[int, Tensor], recording: Recording | None = None) -> None:
    """Replace the meta tensors among the values of `holder` by real ones; one that is held twice stays one."""
    for name, tensor in list(holder.items()):
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
            continue
        if id(tensor) not in known:
            made_in = recording or _recording(tensor)
            with contextlib.suppress(PrepareError):  # random
                if made_in is not None and made_in.holds(tensor):
                    known[id(tensor)] = made_in.value_of(tensor)
        holder[name] = known.get(id(tensor), tensor)


def _recording(tensor: Tensor) -> Recording | None:
    holder = nn.Module()
    holder.register_buffer("tensor", tensor)
    try:
        return recording_of(holder)
    except PrepareError:  # made elsewhere, or written to since
        return None


@unlike_accelerate
@contextmanager
def init_on_device(device: torch.device | str | int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Make tensors on `device` in this block, floating-point ones in `dtype`, where nothing else is asked for."""
    check_dtype(dtype)
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(default_dtype(dtype))
        stack.enter_context(torch.device(device))
        yield
