"""What happens around the forward of a dispatched model's parts: weights come, and inputs follow them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategies.errors import PrepareError, StepError
from strategies.prepared.model import DISPATCHED
from strategies.tree import iterate_tensors, move

from .parts import Part
from .places import Device, device_of, device_that_computes, rests
from .residency import Copies, Holding, Residency, as_view_of


class Unpicklable:
    """Part of a dispatched model that cannot go elsewhere."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise `PrepareError`."""
        raise PrepareError("a dispatched model cannot be copied or pickled; call remove_dispatch(model) first")


class _Running(threading.local):
    """What began and has not ended, innermost last: forwards of one thread end in turn, those of several do not."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


class _Hook(Unpicklable):
    """What modules call: pickling one of them says what is wrong, where a local function could not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        setattr(self, DISPATCHED, True)  # prepare() knows modules of a dispatched model by it

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def follow(
    model: nn.Module,
    parts: Sequence[Part],
    places: Mapping[str, Device],
    main: torch.device,
    handles: list[RemovableHandle],
) -> None:
    """Have inputs move to the weights, and the model's outputs back to where its inputs were."""
    came_from = _Running()  # devices, or `None` where there is no tensor

    def to(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return move(args, device), move(kwargs, device)

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next(iterate_tensors((args, kwargs)), None)
        came_from.stack.append(None if first is None else first.device)

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        device = came_from.stack.pop()
        return output if device is None or output is None else move(output, device)

    for part in parts:
        device = device_of(part.names[0], places)
        target = main if rests(device, main) else device_that_computes(device, main)
        for module in part.modules:
            handles.append(module.register_forward_pre_hook(_Hook(partial(to, target)), prepend=True, with_kwargs=True))
    handles.append(model.register_forward_pre_hook(_Hook(begin), prepend=True, with_kwargs=True))
    handles.append(model.register_forward_hook(_Hook(end), always_call=True))


def keep_in_place(model: nn.Module) -> None:
    """Have `.to()`, `.half()` and the like refuse what would move or cast weights: they would all be in memory."""
    vars(model)["_apply"] = _Hook(partial(_apply_in_place, ref(model)))


def _apply_in_place(reference: ref[nn.Module], function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    model = reference()
    assert model is not None  # it is being called
    for place in {(parameter.device, parameter.dtype) for parameter in model.parameters()}:
        changed = function(torch.empty(0, device=place[0], dtype=place[1]))
        if (changed.device, changed.dtype) != place:
            raise PrepareError(
                f"{type(model).__name__} is dispatched, and its weights stay where its device map says: they cannot be "
                f"moved or cast to {str(changed.device)!r}, {changed.dtype}. Load it with dtype= or another device "
                "map, or call remove_dispatch(model) first."
            )
    type(model)._apply(model, function, recurse)
    return model


def attach(
    model: nn.Module,
    parts: Sequence[Part],
    holdings: Sequence[Holding],
    residency: Residency,
    handles: list[RemovableHandle],
) -> None:
    """Have parts that rest elsewhere brought in around their forward, and again for their backward."""
    for index, (part, holding) in enumerate(zip(parts, holdings, strict=True)):
        for module in dict.fromkeys(part.modules):
            if isinstance(holding, Copies):
                handles += _attach_copies(module, index, holding, residency)
            else:
                handles += _attach_pages(module, index, residency)
    handles.append(model.register_forward_pre_hook(_Hook(lambda *_: residency.begin()), prepend=True))
    handles.append(model.register_forward_hook(_Hook(lambda *_: residency.end())))


def _attach_pages(module: nn.Module, index: int, residency: Residency) -> list[RemovableHandle]:
    entered = _Running()  # whether the part is held

    def before(module: nn.Module, args: Any) -> None:
        entered.stack.append(False)
        residency.enter(index)
        entered.stack[-1] = True

    def backward(gradient: Tensor) -> None:
        if not residency.is_closed:
            residency.enter(index, backward=True)
            residency.leave(index)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if entered.stack.pop():  # called even if something before it raised
            residency.leave(index)
        if torch.is_grad_enabled():
            for tensor in iterate_tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(backward)

    return [
        module.register_forward_pre_hook(_Hook(before), prepend=True),
        module.register_forward_hook(_Hook(after), always_call=True),
    ]


@dataclass
class _Saved:
    """A weight, or a view of it, that autograd wants back in backward."""

    parameter: int
    view: Any


def _attach_copies(module: nn.Module, index: int, holding: Copies, residency: Residency) -> list[RemovableHandle]:
    contexts = _Running()  # `None` where entering failed

    def pack(tensor: Tensor) -> Any:
        for number, parameter in enumerate(holding.parameters):
            view = as_view_of(tensor, parameter.data)
            if view is not None:
                return _Saved(number, view)
        return tensor

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved  # type: ignore[no-any-return]
        residency.enter(index, backward=True)
        try:
            dtype, size, stride, offset = saved.view
            weight = holding.parameters[saved.parameter].data
            return weight.view(dtype).as_strided(size, stride, offset)
        finally:
            residency.leave(index)

    def before(module: nn.Module, args: Any) -> None:
        contexts.stack.append(None)
        _refuse_trained(module, holding.parameters)
        residency.enter(index)
        contexts.stack[-1] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        contexts.stack[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        context = contexts.stack.pop()
        if context is not None:
            context.__exit__(None, None, None)
            residency.leave(index)

    return [
        module.register_forward_pre_hook(_Hook(before), prepend=True),
        module.register_forward_hook(_Hook(after), always_call=True),
    ]


def _refuse_trained(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        raise StepError(
            f"weights of {type(module).__name__} rest on another device than the one they run on, where they cannot be "
            "trained. Run under torch.no_grad(), or freeze them (requires_grad_(False)) and train adapters, inside the "
            "frozen blocks or where the device map gives them a device."
        )
