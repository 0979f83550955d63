"""Hooks on the modules of a model that measure what flows through it, forward and backward, without waiting for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies.errors import ConfigurationError
from strategies.shards import local
from strategies.tree import iterate_tensors


def extremes(tensor: Tensor) -> Tensor | None:
    """The smallest and largest of what this rank holds of `tensor`, shape (2,), finite only if all of it is.

    `None` where there is nothing that could not be finite.
    """
    held = local(tensor.detach())
    if held.is_sparse:
        held = held._values()
    if held.is_complex():
        held = torch.view_as_real(held)
    if not held.is_floating_point() or held.itemsize < 2 or held.numel() == 0:
        return None
    return torch.stack(torch.aminmax(held))  # one pass, no copy; 25 times faster on a CPU than isfinite().all()


@dataclass
class Place:
    """Where a tensor comes from and goes to. Modules are named; `""` is the model."""

    tensor: weakref.ref[Tensor]
    version: int
    made_by: str | None  # the module whose output it is; `None` if no module made it
    within: str  # the module in whose own code it was made or used, if no module did
    used_by: list[str] = field(default_factory=list)
    needs_gradient: bool = False
    is_result: bool = False  # whether the model returned it


@dataclass(frozen=True)
class Check:
    """One look at a tensor: `size`, its extremes, is not finite if the tensor is not."""

    phase: Literal["forward", "backward"]
    place: Place
    size: Tensor
    parameter: str | None = None  # whose gradient it is


class ModuleTrace:
    """Tells `note` of every tensor that goes in and out of the modules of one model, and of every gradient.

    A tensor that one module hands to the next is looked at once. Hooks work only where gradients are recorded and
    `active()` is true. Raises `ConfigurationError` for a compiled model, whose modules do not run one at a time.
    """

    def __init__(self, model: nn.Module, note: Callable[[Check], None], active: Callable[[], bool]) -> None:
        self._note = note
        self._active = active
        self._places: dict[int, Place] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}  # parameters whose gradients are looked at
        refuse_compiled(model, "detect_nonfinite")
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name))

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled() or not self._active():
                return
            if not name:
                self._places.clear()
            for tensor in iterate_tensors((args, kwargs)):
                place = self._known(tensor) or self._look(tensor, None, name.rpartition(".")[0])
                place.used_by.append(name)
            self._watch_parameters(name, module)

        return before

    def _after(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled() or not self._active():
                return
            for tensor in iterate_tensors(output):
                place = self._known(tensor) or self._look(tensor, name, name.rpartition(".")[0])
                place.is_result |= not name

        return after

    def _known(self, tensor: Tensor) -> Place | None:
        place = self._places.get(id(tensor))
        same = place is not None and place.tensor() is tensor and place.version == tensor._version
        return place if same else None

    def _look(self, tensor: Tensor, made_by: str | None, within: str) -> Place:
        place = self._places[id(tensor)] = Place(
            weakref.ref(tensor), tensor._version, made_by, within, needs_gradient=tensor.requires_grad
        )
        size = extremes(tensor)
        if size is not None:
            self._note(Check("forward", place, size))
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._look_back(gradient, place))
        return place

    def _look_back(self, gradient: Tensor, place: Place, parameter: str | None = None) -> None:
        size = extremes(gradient) if self._active() else None
        if size is not None:
            self._note(Check("backward", place, size, parameter))

    def _watch_parameters(self, name: str, module: nn.Module) -> None:
        """Look at gradients before ranks mix them. Under FSDP the parameters of a forward are others than at rest."""
        for own, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            known = self._watched.get(id(parameter))
            if known is not None and known() is parameter:
                continue
            self._watched[id(parameter)] = weakref.ref(parameter)
            place = Place(weakref.ref(parameter), 0, None, name, [name])
            full = f"{name}.{own}" if name else own
            parameter.register_hook(lambda gradient, p=place, n=full: self._look_back(gradient, p, n))


def refuse_compiled(model: nn.Module, asked: str) -> None:
    """Raise `ConfigurationError` for a model that `torch.compile` has fused."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigurationError(
                f"{asked} looks at modules one at a time, but {name or 'the model'} is compiled, which fuses them. "
                "Leave out torch.compile while you look."
            )


def unfinite(named: Iterable[tuple[str, Tensor]], *, masks: bool = False) -> list[str]:
    """The names of the tensors that are not finite, in what this rank holds of them. Waits for the device.

    With `masks`, -inf alone counts as finite.
    """
    sizes = [(name, size) for name, tensor in named if (size := extremes(tensor)) is not None]
    grades = grade([size for _, size in sizes])
    return [name for (name, _), found in zip(sizes, grades, strict=True) if found > masks]


def grade(sizes: list[Tensor]) -> list[int]:
    """Of each of several extremes: 0 if finite, 1 if only -inf is not, as in a mask, else 2. Waits for the device."""
    if not sizes:
        return []
    if len({(size.dtype, size.device) for size in sizes}) > 1:
        plain = [torch.where(torch.isfinite(size), torch.zeros_like(size), size).float() for size in sizes]
        sizes = [size.to(sizes[0].device, non_blocking=True) for size in plain]
    together = torch.stack(sizes)
    worse = ~(together[:, 1] < torch.inf)  # NaN too, which is then both extremes
    grades: list[int] = (torch.isfinite(together).all(dim=1).logical_not().int() + worse.int()).tolist()
    return grades
