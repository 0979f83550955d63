"""A model whose weights are in several places, run as if they were in one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from accelerator.byte_sizes import in_words, number_of_bytes
from strategies.errors import ConfigurationError, PrepareError, listed
from strategies.prepared.model import DISPATCHED
from strategies.shards import is_quantized
from strategies.tree import move

from . import pages
from .device_map import Kind, infer_auto_device_map
from .hooks import Unpicklable, attach, follow, keep_in_place
from .load import load_checkpoint_in_model, written
from .parts import Classes, Part, described, parts_of, running_around
from .places import Device, DeviceMap, check_device_map, device_of, device_that_computes, main_device, rests
from .quantize import Quantize
from .residency import Copies, Holding, MappedPages, Residency
from .words import unlike_accelerate


@dataclass
class Dispatched(Unpicklable):
    """What `dispatch_model` did to a model, so that it can be undone."""

    device_map: dict[str, Device]
    main_device: torch.device
    residency: Residency | None = None
    handles: list[RemovableHandle] = field(default_factory=list)


@unlike_accelerate
def dispatch_model(
    model: nn.Module,
    device_map: DeviceMap,
    *,
    main_device: torch.device | str | int | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_budget: int | str | None = None,
    no_split_classes: Classes | None = None,
) -> nn.Module:
    """Put the weights of `model` where `device_map` says, and have it run from there; return `model` itself.

    What is on `"disk"`, or on `"cpu"` beside accelerators, is fetched to `main_device` (the first accelerator of the
    map, else the CPU) when its part runs, the next parts while this one computes, at most `offload_budget` bytes of it
    at a time (default: the largest part, with what runs around it, and one more). Weights on the disk that are mapped
    from a file already stay in that file; others are written to `offload_folder`. Inputs follow the weights, outputs
    come back to the device of the inputs. Backward fetches again. Parts are modules of `no_split_classes`, and what is
    outside of those; as for `infer_auto_device_map`. `remove_dispatch` undoes it; until then `.to()` raises.

    Not a collective: every process dispatches its own. Raises `ConfigurationError` if the map does not fit the model or
    the budget not its largest part and what runs around it, `PrepareError` for a model that is dispatched or on the
    meta device, and `StateError` if weights cannot be written.
    """
    check_device_map(model, device_map)
    _refuse(model)
    places = dict(device_map)
    main = _main_device(places, main_device)
    parts = parts_of(model, no_split_classes, named=places)
    resting = [part for part in parts if rests(device_of(part.names[0], places), main)]
    _refuse_moving(parts, places, main)
    budget = _budget(resting, offload_budget)
    mappings = pages.FileMappings.read()
    for part in parts:
        _place(model, part, device_of(part.names[0], places), main, mappings, offload_folder)
    state = Dispatched(places, main)
    setattr(model, DISPATCHED, state)
    devices = {main} | {
        device_that_computes(device_of(part.names[0], places), main) for part in parts if part not in resting
    }
    if len(devices) > 1 or main.type != "cpu":
        follow(model, parts, places, main, state.handles)
    if resting:
        mappings = pages.FileMappings.read()  # with what was written just now
        holdings: list[Holding] = [_holding(part, main, mappings) for part in resting]
        state.residency = Residency(holdings, budget)
        attach(model, resting, holdings, state.residency, state.handles)
    if state.handles:
        keep_in_place(model)
    return model


@unlike_accelerate
def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    device_map: DeviceMap | Kind = "auto",
    *,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_classes: Classes | None = None,
    dtype: torch.dtype | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_budget: int | str | None = None,
    strict: bool = True,
    quantize: Quantize | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> nn.Module:
    """Load `checkpoint` into `model`, usually one from `init_empty_weights`, each weight to its place; return `model`.

    `device_map`: a map, or how to infer one. See `infer_auto_device_map`, `load_checkpoint_in_model` and
    `dispatch_model` for the other arguments and for what is raised.
    """
    if isinstance(device_map, str):
        device_map = infer_auto_device_map(
            model, max_memory, no_split_classes, dtype, kind=device_map, quantize=quantize
        )
    elif max_memory is not None:
        raise ConfigurationError("max_memory is for a device map that is inferred; got one that says where all goes")
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map,
        dtype=dtype,
        offload_folder=offload_folder,
        strict=strict,
        quantize=quantize,
        key_mapping=key_mapping,
    )
    return dispatch_model(
        model,
        device_map,
        offload_folder=offload_folder,
        offload_budget=offload_budget,
        no_split_classes=no_split_classes,
    )


def remove_dispatch(model: nn.Module) -> nn.Module:
    """Take off what `dispatch_model` attached; return `model`. Its weights stay where they rest, and work there."""
    state: Dispatched | None = vars(model).pop(DISPATCHED, None)
    if state is not None:
        vars(model).pop("_apply", None)
        for handle in state.handles:
            handle.remove()
        if state.residency is not None:
            state.residency.close()
    return model


@unlike_accelerate
def cpu_offload(
    model: nn.Module,
    execution_device: torch.device | str | int | None = None,
    *,
    offload_budget: int | str | None = None,
) -> nn.Module:
    """Keep all weights in CPU memory and run on `execution_device` (default: accelerator 0, if there is one).

    See `dispatch_model`. On a machine without accelerators nothing has to move, and nothing is attached.
    """
    device = _first_device() if execution_device is None else execution_device
    return dispatch_model(model, {"": "cpu"}, main_device=device, offload_budget=offload_budget)


@unlike_accelerate
def disk_offload(
    model: nn.Module,
    offload_folder: str | os.PathLike[str] | None = None,
    execution_device: torch.device | str | int | None = None,
    *,
    offload_budget: int | str | None = None,
) -> nn.Module:
    """Keep all weights on the disk and run on `execution_device` (default: accelerator 0, else the CPU).

    See `dispatch_model`: weights that were loaded by mapping stay in their files, others are written to
    `offload_folder`, and leave memory one by one.
    """
    device = _first_device() if execution_device is None else execution_device
    return dispatch_model(
        model, {"": "disk"}, main_device=device, offload_folder=offload_folder, offload_budget=offload_budget
    )


class OffloadHook:
    """Returned by `cpu_offload_with_hook`: sends its model back to the CPU."""

    def __init__(self, model: nn.Module, handle: RemovableHandle) -> None:
        self._model = model
        self._handle = handle

    def offload(self) -> None:
        """Move the model to the CPU, until it runs again."""
        self._model.to("cpu")

    def remove(self) -> None:
        """Let the model stay where it is from now on."""
        self._handle.remove()


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: torch.device | str | int | None = None,
    prev_module_hook: OffloadHook | None = None,
) -> tuple[nn.Module, OffloadHook]:
    """Keep a whole model in CPU memory until it runs, then on `execution_device` until the hook's `offload()`.

    For pipelines of several models: give each the hook of the one before it, which is sent back first. Inputs follow.
    """
    device = torch.device(_first_device() if execution_device is None else execution_device)
    model.to("cpu")

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if prev_module_hook is not None:
            prev_module_hook.offload()
        module.to(device)
        return move(args, device), move(kwargs, device)

    return model, OffloadHook(model, model.register_forward_pre_hook(before, prepend=True, with_kwargs=True))


# -- where things go ---------------------------------------------------------------------------------------


def _first_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, 0)


def _main_device(places: Mapping[str, Device], asked: torch.device | str | int | None) -> torch.device:
    main = main_device(places) if asked is None else torch.device(asked)
    if main.type in ("meta", "xla"):
        raise ConfigurationError(f"main_device is {str(main)!r}; expected the CPU or an accelerator that torch drives")
    return main


def _refuse(model: nn.Module) -> None:
    if getattr(model, DISPATCHED, None) is not None:
        raise PrepareError(f"{type(model).__name__} is dispatched already; call remove_dispatch(model) first")
    meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if meta:
        raise PrepareError(
            f"{listed(meta)} of {type(model).__name__} have no numbers yet; load them first, as "
            "load_checkpoint_and_dispatch does"
        )


def _refuse_moving(parts: Sequence[Part], places: DeviceMap, main: torch.device) -> None:
    """Raise `ConfigurationError` for quantized weights that are to be elsewhere than they are, or to come and go."""
    for part in parts:
        device = device_of(part.names[0], places)
        for tensor in part.tensors:
            if is_quantized(tensor) and (rests(device, main) or tensor.device != device_that_computes(device, main)):
                raise ConfigurationError(
                    f"{part.names[0] or 'the model'!r} is to be on {device!r}, and its weights are quantized, which "
                    f"stay where they are, on {str(tensor.device)!r}. Leave them there, or load them from their "
                    "checkpoint without quantize (for some modules, with a mapping)."
                )


def _budget(resting: Sequence[Part], asked: int | str | None) -> int:
    given = None if asked is None else number_of_bytes(asked, "offload_budget")
    if not resting:
        return 0
    sizes = [part.fetched_bytes for part in resting]
    around = running_around(resting)
    together = [sizes[index] + sum(sizes[other] for other in around[index]) for index in range(len(resting))]
    most = max(range(len(resting)), key=together.__getitem__)
    if given is None:
        return together[most] + max(sizes)
    if given < together[most]:
        raise ConfigurationError(
            f"offload_budget is {in_words(given)}, which cannot hold the largest part, "
            f"{described(most, resting, sizes, around)}; "
            "give that at least, and twice as much for the next part to be read meanwhile"
        )
    return given


def _place(
    model: nn.Module,
    part: Part,
    device: Device,
    main: torch.device,
    mappings: pages.FileMappings,
    folder: str | os.PathLike[str] | None,
) -> None:
    fetched = {id(parameter) for parameter in part.fetched}
    for tensor in part.tensors:
        stays = id(tensor) not in fetched  # a buffer or an adapter: small, and written to, so it lies where it is used
        if device != "disk" or stays:
            place = main if stays and rests(device, main) else device_that_computes(device, main)
            if tensor.device != place:
                tensor.data = tensor.detach().to(place)
        elif tensor.nbytes and not mappings.hold(tensor.detach()):
            tensor.data = written(tensor.detach().cpu(), _name_of(model, tensor), folder)


def _name_of(model: nn.Module, wanted: Tensor) -> str:
    named = [*model.named_parameters(), *model.named_buffers()]
    return next(name for name, tensor in named if tensor is wanted)


def _holding(part: Part, main: torch.device, mappings: pages.FileMappings) -> Holding:
    return MappedPages(part, mappings) if main.type == "cpu" else Copies(part, main, mappings)
