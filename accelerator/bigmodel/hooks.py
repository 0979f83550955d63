"""What happens around the forward of a dispatched model's parts: weights come, and inputs follow them."""

from __future__ import annotations

import inspect
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


@dataclass
class _Entered:
    """A module that runs, and what there is to do once it does not."""

    module: nn.Module
    leave: Callable[[], None] | None = None


class _Modules(_Running):
    """The modules that run in this thread."""

    def begin(self, model: nn.Module) -> None:
        """A forward of all begins: what did not end was interrupted, and torch calls no hook for KeyboardInterrupt."""
        if self.stack and not _is_called_by_itself(model):
            self._leave_to(0)
        self.enter(model)

    def enter(self, module: nn.Module) -> _Entered:
        """A module begins to run."""
        self.stack.append(_Entered(module))
        return self.stack[-1]  # type: ignore[no-any-return]

    def leave(self, module: nn.Module) -> None:
        """A module does not run any more, nor what it called."""
        depths = [depth for depth, entered in enumerate(self.stack) if entered.module is module]
        if depths:
            self._leave_to(depths[-1])

    def _leave_to(self, depth: int) -> None:
        while len(self.stack) > depth:
            leave = self.stack.pop().leave
            if leave is not None:
                leave()


def _is_called_by_itself(module: nn.Module) -> bool:
    calls, frame = 0, inspect.currentframe()
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module
        frame = frame.f_back
    return calls > 1  # besides the one that begins


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
    running = _Modules()
    for index, (part, holding) in enumerate(zip(parts, holdings, strict=True)):
        for module in dict.fromkeys(part.modules):
            if isinstance(holding, Copies):
                handles += _attach_copies(module, index, holding, residency, running)
            else:
                handles += _attach_pages(module, index, residency, running)

    def begin(module: nn.Module, args: Any) -> None:
        running.begin(module)
        residency.begin()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        running.leave(module)
        residency.end()

    handles.append(model.register_forward_pre_hook(_Hook(begin), prepend=True))
    handles.append(model.register_forward_hook(_Hook(end), always_call=True))


def _attach_pages(module: nn.Module, index: int, residency: Residency, running: _Modules) -> list[RemovableHandle]:
    def before(module: nn.Module, args: Any) -> None:
        entered = running.enter(module)
        residency.enter(index)
        entered.leave = partial(residency.leave, index)

    def backward(gradient: Tensor) -> None:
        if not residency.is_closed:
            residency.enter(index, backward=True)
            residency.leave(index)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running.leave(module)  # called even if something before it raised
        if torch.is_autocast_enabled("cpu"):
            torch.clear_autocast_cache()  # it would keep a cast of every weight until its block ends
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


def _attach_copies(
    module: nn.Module, index: int, holding: Copies, residency: Residency, running: _Modules
) -> list[RemovableHandle]:
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

    def leave(context: torch.autograd.graph.saved_tensors_hooks) -> None:
        context.__exit__(None, None, None)
        residency.leave(index)

    def before(module: nn.Module, args: Any) -> None:
        entered = running.enter(module)
        _refuse_trained(module, holding.parameters)
        residency.enter(index)
        context = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        context.__enter__()
        entered.leave = partial(leave, context)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running.leave(module)

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
