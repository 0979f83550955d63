"""Build a model without memory, and fill it later with the numbers it would have had.

Inside `record`, tensors are made on the meta device and every operation on them is written down. Played
back on a real device from the same state of the random generator, the operations give bit for bit the
tensors that building the model there gives, whatever its constructor does: `reset_parameters`, `nn.init` by
hand, a second pass over all modules. Each tensor is handed out after its last operation and freed, so that a
rank which keeps only its shard never holds the model. (torchdistx's deferred_init worked so; calling
`reset_parameters()` of each module again would lose what the model's own constructor wrote afterwards.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PrepareError
from .recording import (
    TRUNC_NORMAL,
    AsIfReal,
    Place,
    Recorder,
    Recording,
    Sink,
    random_state,
    set_random_state,
    trunc_normal,
)
from .shards import local

_ATTRIBUTE = "_deferred_init"  # of a meta tensor: the recording it is in
EMPTY = "_born_empty"  # of a parameter that waits to be loaded


@contextmanager
def record(device: torch.device, *, empty: bool = False) -> Iterator[Recording]:
    """Make tensors on the meta device in this block, and write down how.

    At its end the random generator of `device` stands where building the model there would have left it. With
    `empty`, parameters will hold NaN instead of their numbers until they are loaded.
    """
    recording = Recording(device, empty=empty)
    born: list[Tensor] = []

    def note(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.device.type == "meta":
            setattr(tensor, _ATTRIBUTE, recording)
            born.append(tensor)

    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(note),
        hooks.register_module_buffer_registration_hook(note),
    ]

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.device.type != "meta":
            return trunc_normal(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        recording.note_filling(trunc_normal, tensor, args, kwargs)
        return tensor

    setattr(torch.nn.init, TRUNC_NORMAL, noted)
    try:
        with AsIfReal(recording), Recorder(recording):
            yield recording
    finally:
        setattr(torch.nn.init, TRUNC_NORMAL, trunc_normal)
        for handle in handles:
            handle.remove()
    recording.end(born)
    if not torch.equal(random_state(device), recording.random_state):
        raise PrepareError(
            "the random generator was seeded, or drawn from, inside init_module(), where tensors are made later. Seed "
            "it before, or build the model outside."
        )
    if not empty:
        recording.play({})


def recording_of(model: nn.Module) -> Recording | None:
    """The recording that made the tensors of `model`; `None` if none of them is on the meta device.

    Raises `PrepareError` for those on the meta device that no recording made, or that were written to since.
    """
    meta = {name: tensor for name, tensor in _named_tensors(model) if tensor.is_meta}
    recordings = {id(found): found for t in meta.values() if (found := getattr(t, _ATTRIBUTE, None)) is not None}
    strangers = [name for name, t in meta.items() if not any(one.holds(t) for one in recordings.values())]
    if strangers or len(recordings) > 1:
        what = f"{len(strangers)} tensors on the meta device ({_listed(strangers)})"
        raise PrepareError(
            f"{type(model).__name__} has {what if strangers else 'parts of two init_module() blocks'}, which nothing "
            "can fill. Build the whole model inside one `with accelerator.init_module():`, or on a real device."
        )
    changed = [name for name, t in meta.items() if any(one.was_changed(t) for one in recordings.values())]
    if changed:
        raise PrepareError(
            f"{_listed(changed)} of {type(model).__name__} had no numbers yet when the script wrote to it, after "
            "init_module(). Write, or load, inside the block, or after prepare()."
        )
    return next(iter(recordings.values()), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@contextmanager
def filling(
    model: nn.Module, recording: Recording, state: Tensor
) -> Iterator[Callable[[Callable[[Tensor, Tensor], None]], None]]:
    """A function that gives `model` its numbers, after this block has wrapped it: `fill(copy)`.

    Every meta parameter and buffer is allocated on the recording's device as it is now, sharded or whole; then
    `copy(full, target)` is called with each one's numbers, one at a time. They are drawn from `state`; the
    generator itself is left as it is.
    """
    _refuse_plain_attributes(model)
    places = {name: Place.of(tensor) for name, tensor in _named_tensors(model) if tensor.is_meta}
    filled = {name for name, _ in model.named_parameters(remove_duplicate=False)} if recording.empty else set()

    def fill(copy: Callable[[Tensor, Tensor], None]) -> None:
        _allocate(model, recording.device)
        takers: dict[int, list[tuple[Place, Tensor]]] = defaultdict(list)
        for name, target in _named_tensors(model):
            if name not in places:
                continue  # it was real all along
            if name in filled:
                mark_empty(target)
            else:
                takers[places[name].memory].append((places[name], target))
        before = random_state(recording.device)
        set_random_state(recording.device, state)
        try:
            recording.play({memory: _giver(taking, copy) for memory, taking in takers.items()})
        finally:
            set_random_state(recording.device, before)

    yield fill


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give every tensor of `model` memory; parameters that were tied still are."""
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for first, *others in tied.values():
        for name in others:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))


def mark_empty(parameter: Tensor) -> None:
    """Fill `parameter` with NaN, so that it is seen if nothing is ever loaded into it."""
    with torch.no_grad():
        if parameter.is_floating_point():
            local(parameter.detach()).fill_(math.nan)
    setattr(parameter, EMPTY, True)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _refuse_plain_attributes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise PrepareError(
                    f"{name + '.' if name else ''}{attribute} of {type(model).__name__} is a plain tensor, which "
                    "init_module() cannot fill later. Make it a buffer: self.register_buffer(name, tensor)."
                )


def _giver(taking: list[tuple[Place, Tensor]], copy: Callable[[Tensor, Tensor], None]) -> Sink:
    def give(memory: torch.UntypedStorage) -> None:
        for place, target in taking:
            copy(place.within(memory), target)

    return give
