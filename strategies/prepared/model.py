"""The model that `prepare` returns: the user's module, called through the strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn
from torch.nn import Parameter

from ..errors import PrepareError, StateError, StepError, listed
from ..process_group import explain_lost_peer
from ..sharded_model import explain_forward, refuse_conversion, release_gathered
from ..shards import is_quantized, is_sharded
from .view import View, make_view
from .weights import LoadingWhole, empty_parameters, warn_of_empty

if TYPE_CHECKING:
    from ..accumulation import Accumulation


DISPATCHED = "_dispatched"  # of a model whose weights a device map spreads


class PreparedModel(View):
    """What comes before the user's own methods in a prepared model."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, in the strategy's precision; synchronised where gradients are recorded."""
        link = self._link
        if link.empty:
            link.warn_of_empty()
        # Without gradients there is nothing to synchronise, and ranks may call as often as they like.
        if link.bypass or not torch.is_grad_enabled():
            module = link.original
        else:
            module = link.wrapped
            link.was_called = True  # only ever written here: torch.compile would guard on what is read
        try:
            if not link.autocasts:
                return module(*args, **kwargs)
            accumulation = link.accumulation
            with accumulation.strategy.autocast(accumulation.world, accumulation.precision):
                return module(*args, **kwargs)
        except RuntimeError as error:  # ranks meet in forward too: FSDP gathers, DDP agrees on buckets and buffers
            reason: Exception | None = explain_lost_peer(link.accumulation.world, error)
            if reason is None and link.sharded_parameters:
                reason = explain_forward(link.original, error)
            if reason is None:
                raise
            raise reason from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients, except of an accumulation window that is still open."""
        if self._link.may_zero():
            self._link.original.zero_grad(set_to_none)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """The parameters that the optimizer holds, also while their module shows what it gathered for a forward."""
        link = self._link
        if link.sharded_parameters and recurse and remove_duplicate:
            return iter([(f"{prefix}.{name}" if prefix else name, p) for name, p in link.sharded_parameters.items()])
        return iter(link.original.named_parameters(prefix, recurse, remove_duplicate))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole weights, which every rank has, wherever the parameters are; torch's own where none is sharded."""
        return self._link.load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `float`, `cuda` and the like: sharded parameters stay where and what they are."""
        self._link.refuse_conversion(fn)
        self._link.original._apply(fn, recurse)
        return self

    def _get_fsdp_state(self) -> Any:
        """Where the methods of torch's `FSDPModule` look: it knows the user's module only."""
        return self._link.original._get_fsdp_state()


class ModelLink:
    """What a prepared model knows: the user's module, what the strategy made of it, and their parameters.

    Parameters may be replaced by wrapping, so each name is remembered with the object that had it before.
    """

    def __init__(self, original: nn.Module, accumulation: Accumulation) -> None:
        self.original = original
        self.name = type(original).__name__  # wrapping may change the class
        self.accumulation = accumulation
        self.was_called = False  # recording gradients, since a window last asked
        self.bypass = False  # whether calls go past the wrapper, because another window is open
        self._names = {id(parameter): (name, ref(parameter)) for name, parameter in original.named_parameters()}
        strategy, world, precision = accumulation.strategy, accumulation.world, accumulation.precision
        precision.check(world.device)
        self.wrapped = strategy.wrap(original, world, precision)
        self.original = strategy.unwrap(self.wrapped)
        self._parameters = dict(self.original.named_parameters())
        self._live = {id(parameter): parameter for parameter in self._parameters.values()}
        self._frozen = {name: parameter for name, parameter in self._parameters.items() if not parameter.requires_grad}
        self.autocasts = precision.dtype is not None
        self.empty = empty_parameters(self.original)
        self._sharded = any(is_sharded(parameter) for parameter in self._parameters.values())
        self._structure = _structure_of(self.original)

    def warn_of_empty(self) -> None:
        """Say once that parameters were never filled."""
        warn_of_empty(self.name, self.empty)
        self.empty = {}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool, assign: bool) -> Any:
        """Load into the user's module. `assign` would put other parameters in place of those that are prepared."""
        if assign:
            raise StateError(
                "load_state_dict(assign=True) would replace the parameters of a prepared model, which the optimizer "
                "and other ranks know. Load before prepare(), or without assign."
            )
        if not self._sharded:
            return self.original.load_state_dict(state, strict)
        with LoadingWhole():
            return self.original.load_state_dict(state, strict)

    def release_gathered(self) -> None:
        """Have the next forward gather parameters anew, because their parts are about to be written to."""
        if self._sharded:
            release_gathered(self.original)

    def refuse_conversion(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise `StepError` if `convert` would change sharded parameters."""
        if self._sharded:
            refuse_conversion(self.original, convert)

    @property
    def sharded_parameters(self) -> Mapping[str, Parameter]:
        """The parameters by name if any of them is sharded, else nothing."""
        return self._parameters if self._sharded else {}

    @property
    def is_trained(self) -> bool:
        """Whether a prepared optimizer holds parameters of this model."""
        return any(self in optimizer.models for optimizer in self.accumulation.optimizers)

    def find(self, parameter: torch.Tensor) -> Parameter | None:
        """The live parameter for one that this model had before or after wrapping; `None` for a stranger."""
        name, remembered = self._names.get(id(parameter), (None, None))
        if name is not None and remembered is not None and remembered() is parameter:
            if name not in self._parameters:
                strategy = type(self.accumulation.strategy).__name__
                raise PrepareError(
                    f"{self.name} had a parameter {name!r} before it was wrapped, and has none of "
                    f"that name now. {strategy}.wrap must keep the names of parameters."
                )
            return self._parameters[name]
        return self._live.get(id(parameter))

    def check_parameters(self) -> None:
        """Raise `StepError` for a parameter that was put into the model since: the optimizer does not hold it."""
        for held, known in self._structure:
            if len(held) != len(known) or (known and not all(map(is_, held.values(), known))):
                break
        else:
            return
        for name, parameter in self.original.named_parameters():
            if self._live.get(id(parameter)) is parameter:
                continue
            if parameter.requires_grad or name in self._parameters:
                raise StepError(
                    f"{name} of {self.name} is not the parameter that was prepared: it was added or "
                    "replaced since, and neither ranks nor the optimizer know it. Change the model before prepare(), "
                    "or write into the parameter: with torch.no_grad(): parameter.copy_(value)."
                )
            self._frozen[name] = parameter  # of a teacher, say, that nobody trains
        self._structure = _structure_of(self.original)

    def check_unfrozen(self) -> None:
        """Raise `StepError` for a parameter that was unfrozen since, which ranks would not synchronise."""
        for name, parameter in self._frozen.items():
            if parameter.grad is not None:
                raise StepError(
                    f"{name} of {self.name} was frozen when it was prepared or added, and has a gradient now, "
                    "which ranks do not synchronise. Unfreeze parameters before prepare(), and freeze after it those "
                    "that are to wait: parameter.requires_grad_(False)."
                )

    def may_zero(self) -> bool:
        """Whether no window of this model is open."""
        windows = {id(optimizer.window): optimizer.window for optimizer in self.optimizers}
        return all(window is None or window.may_zero(window.optimizers) for window in windows.values())

    @property
    def optimizers(self) -> list[Any]:
        """The prepared optimizers that train this model."""
        return [optimizer for optimizer in self.accumulation.optimizers if self in optimizer.models]

    def release(self) -> None:
        """Let go of the wrapper, so that its hooks and threads end before the process group does."""
        self.wrapped = self.original


def _structure_of(model: nn.Module) -> list[tuple[dict[str, Any], list[Any]]]:
    """Where each module keeps its parameters and modules, and what is there: a quarter of named_parameters() to see."""
    kept = [held for module in model.modules() for held in (module._parameters, module._modules)]
    return [(held, [*held.values()]) for held in kept]


def prepare_model(model: nn.Module, accumulation: Accumulation) -> nn.Module:
    """`model` placed and wrapped by the strategy, behind a view that is still an instance of its class."""
    if isinstance(model, torch.jit.ScriptModule):
        raise PrepareError(
            f"{type(model).__name__} is a TorchScript module, which cannot be prepared. Give the Python module, "
            "and torch.compile it where speed is wanted."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise PrepareError(
            f"{type(model).__name__} is already parallel. Give the module inside it (model.module); "
            "the strategy wraps it."
        )
    _refuse_dispatched(model, accumulation)
    quantized = [name for name, parameter in model.named_parameters() if is_quantized(parameter)]
    if quantized:
        raise PrepareError(
            f"{listed(quantized)} of {type(model).__name__} are quantized by torchao: they stay where they are, and no "
            "strategy can move or synchronise them. Use the model for inference without prepare(); or prepare only the "
            "adapters, as a module of their own; or load it without quantize."
        )
    link = ModelLink(model, accumulation)
    accumulation.models.append(link)
    return make_view(link.original, PreparedModel, link)  # type: ignore[return-value]  # also of the user's class


def _refuse_dispatched(model: nn.Module, accumulation: Accumulation) -> None:
    """Raise `PrepareError` for a dispatched model, and for one around it or within it that would move or be sent."""
    name = type(model).__name__
    spread = set((getattr(model, "hf_device_map", None) or {}).values())  # how Accelerate and transformers mark theirs
    if getattr(model, DISPATCHED, None) is not None or len(spread) > 1:
        raise PrepareError(
            f"{name} is dispatched: a device map says where its weights are, and they come and go, "
            "so no strategy can place or synchronise them. Use it for inference without prepare(); or prepare only the "
            "adapters, as a module of their own; or call remove_dispatch(model), or do not dispatch it, and "
            "cut it over processes with strategy='fsdp'."
        )
    if accumulation.strategy.single_process and accumulation.world.device.type == "cpu":
        return  # nothing moves, and nothing is sent
    inside = [path for path, module in model.named_modules() if _is_of_dispatched(module)]
    if inside:
        raise PrepareError(
            f"{name} holds modules of a dispatched model ({listed(inside)}): their weights come and go, so no strategy "
            "can place or synchronise them. Prepare only what is trained, as a module of its own, and call it on what "
            "the dispatched model gives; or train in one process on the CPU (strategy='cpu'); or call "
            "remove_dispatch() on the model inside."
        )


def _is_of_dispatched(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return DISPATCHED in vars(module) or any(hasattr(hook, DISPATCHED) for hook in hooks)
