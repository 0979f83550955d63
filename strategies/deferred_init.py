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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors  # what torch.device as a context changes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .errors import PrepareError
from .shards import local

_ATTRIBUTE = "_deferred_init"  # of a meta parameter: the recording it is in
EMPTY = "_born_empty"  # of a parameter that waits to be loaded
_Sink = Callable[[torch.UntypedStorage], None]
# Fills by rejection, drawing until nothing is rejected; `torch.nn.init` calls it by this name.
_TRUNC_NORMAL = "_no_grad_trunc_normal_"
_trunc_normal = getattr(torch.nn.init, _TRUNC_NORMAL)
_aten = torch.ops.aten
_ALLOCATING = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
}
OVERWRITING = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.copy_.default,
    _aten.log_normal_.default,
    _aten.exponential_.default,
    _aten.cauchy_.default,
    _trunc_normal,
}


@dataclass(frozen=True)
class Place:
    """Where a meta tensor lies: which memory, and the part of it."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    num_bytes: int  # of the whole memory

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """The place of `tensor`, which is on the meta device."""
        storage = tensor.untyped_storage()
        size, stride = tuple(tensor.size()), tensor.stride()
        return cls(storage._cdata, tensor.dtype, size, stride, int(tensor.storage_offset()), int(storage.nbytes()))

    def within(self, memory: torch.UntypedStorage) -> Tensor:
        """This part of real memory."""
        return torch.empty(0, dtype=self.dtype, device=memory.device).set_(memory, self.offset, self.size, self.stride)

    @property
    def is_all(self) -> bool:
        """Whether this is every byte of its memory."""
        num_elements = 1
        for size in self.size:
            num_elements *= size
        return num_elements * self.dtype.itemsize == self.num_bytes


@dataclass
class _Call:
    """One operation: what it is called with, tensors by their place, and the tensors it makes."""

    function: Any
    args: Any
    kwargs: Any
    made: list[Place]
    touched: set[int] = field(default_factory=set)
    overwrites: int | None = None  # the memory of which it leaves nothing


class Recording:
    """The operations that build a model, from one state of the random generator of one device."""

    def __init__(self, device: torch.device, *, empty: bool) -> None:
        self.device = device
        self.empty = empty  # whether parameters get no numbers: they will be loaded
        self.dtype = torch.get_default_dtype()
        self.random_state = _random_state(device)
        self._calls: list[_Call] = []
        self._alive: list[Tensor] = []  # so that no memory is given the address of an earlier one
        self._memories: set[int] = set()

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down one call, after it ran on meta tensors."""
        made = [tensor for tensor in _tensors(result) if tensor.is_meta]
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in self._memories]
        seeded = torch.Tag.nondeterministic_seeded in function.tags
        if seeded and not made:
            raise PrepareError(
                f"{function} drew random numbers for a tensor on a real device inside init_module(), where tensors are "
                "made later, one at a time. Leave the device to init_module(), or build the model outside it."
            )
        if not new and not (function._schema.is_mutable and made):
            return  # a view, or nothing to do with the model
        self._append(_Call(function, _placed(args), _placed(kwargs), [Place.of(tensor) for tensor in new]))
        self._alive += new

    def note_filling(self, function: Any, tensor: Tensor, args: Any, kwargs: Any) -> None:
        """Write down one call that fills the meta tensor `tensor`, as a whole: it cannot run without numbers."""
        self._append(_Call(function, (Place.of(tensor), *args), kwargs, []))

    def _append(self, call: _Call) -> None:
        places = _places((call.args, call.kwargs))
        call.touched = {place.memory for place in [*places, *call.made]}
        target = call.args[0] if call.function in OVERWRITING and call.args else None
        if isinstance(target, Place) and target.is_all and [p.memory for p in places].count(target.memory) == 1:
            call.overwrites = target.memory
        self._calls.append(call)
        self._memories.update(place.memory for place in call.made)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this recording made the memory of a meta tensor."""
        return tensor.untyped_storage()._cdata in self._memories

    def play(self, sinks: Mapping[int, _Sink]) -> None:
        """Run every operation again, for real; give each memory in `sinks` to its sink when it is final."""
        next_use: list[dict[int, _Call | None]] = []
        later: dict[int, _Call] = {}
        for call in reversed(self._calls):
            next_use.append({memory: later.get(memory) for memory in call.touched})
            later |= dict.fromkeys(call.touched, call)
        real: dict[int, torch.UntypedStorage] = {}
        with _default_dtype(self.dtype), torch.no_grad():
            for call, following in zip(self._calls, reversed(next_use), strict=True):
                self._run(call, real)
                for memory, after in following.items():
                    if after is None and memory in sinks:
                        sinks[memory](real[memory])
                    if after is None or after.overwrites == memory:
                        real.pop(memory, None)

    def _run(self, call: _Call, real: dict[int, torch.UntypedStorage]) -> None:
        if call.function in _ALLOCATING and len(call.made) == 1:
            real[call.made[0].memory] = self._memory(call.made[0])
            return

        def tensor_at(item: Any) -> Any:
            if not isinstance(item, Place):
                return self.device if isinstance(item, torch.device) and item.type == "meta" else item
            if item.memory not in real:  # freed since the next operation on it writes all of it: this one
                real[item.memory] = self._memory(item)
            return item.within(real[item.memory])

        result = call.function(*tree_map(tensor_at, call.args), **tree_map(tensor_at, call.kwargs))
        made = iter(call.made)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata in {memory._cdata for memory in real.values()}:
                continue
            place = next(made)
            if tuple(tensor.stride()) != place.stride or tensor.storage_offset() != place.offset:
                tensor = place.within(self._memory(place)).copy_(tensor)
            real[place.memory] = tensor.untyped_storage()

    def _memory(self, place: Place) -> torch.UntypedStorage:
        return torch.empty(place.num_bytes, dtype=torch.uint8, device=self.device).untyped_storage()


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            raise PrepareError(
                "the model's constructor looks at a number of a tensor (.item(), bool(), float()), which inside "
                "init_module() is only made by prepare(). Build this model outside init_module()."
            )
        result = func(*args, **(kwargs or {}))
        self._recording.note(func, args, kwargs or {}, result)
        return result


class _AsIfReal(TorchFunctionMode):
    """Makes tensors on the meta device, and lets constructors work on them as on real ones.

    `torch.device("meta")` does less: libraries ask for it and leave their initialisation out, as `torch.nn.init`
    does for meta tensors, and `torch.tensor` loses its values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]  # a property in C
            return False
        if func in _device_constructors() and kwargs.get("device") is None:
            if func not in (torch.tensor, torch.as_tensor, torch.asarray):
                return func(*args, **{**kwargs, "device": "meta"})
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to("meta") if made.numel() else made  # an empty one is made to see what is the default device
        return func(*args, **kwargs)


@contextmanager
def record(device: torch.device, *, empty: bool = False) -> Iterator[None]:
    """Make tensors on the meta device in this block, and write down how.

    At its end the random generator of `device` stands where building the model there would have left it. With
    `empty`, parameters will hold NaN instead of their numbers until they are loaded.
    """
    recording = Recording(device, empty=empty)
    handle = torch.nn.modules.module.register_module_parameter_registration_hook(
        lambda module, name, parameter: setattr(parameter, _ATTRIBUTE, recording)
    )

    def trunc_normal(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.device.type != "meta":
            return _trunc_normal(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        recording.note_filling(_trunc_normal, tensor, args, kwargs)
        return tensor

    setattr(torch.nn.init, _TRUNC_NORMAL, trunc_normal)
    try:
        with _AsIfReal(), _Recorder(recording):
            yield
    finally:
        setattr(torch.nn.init, _TRUNC_NORMAL, _trunc_normal)
        handle.remove()
    if not empty:
        recording.play({})


def recording_of(model: nn.Module) -> Recording | None:
    """The recording that made the parameters of `model`; `None` if none is on the meta device.

    Raises `PrepareError` for parameters on the meta device that no recording made.
    """
    meta = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    recordings = {id(found): found for p in meta.values() if (found := getattr(p, _ATTRIBUTE, None)) is not None}
    strangers = [name for name, p in meta.items() if not any(one.holds(p) for one in recordings.values())]
    if strangers or len(recordings) > 1:
        listed = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        what = f"{len(strangers)} parameters on the meta device ({listed})" if strangers else "two init_module() blocks"
        raise PrepareError(
            f"{type(model).__name__} has {what}, which nothing can fill. Build the whole model inside one "
            "`with accelerator.init_module():`, or on a real device."
        )
    return next(iter(recordings.values()), None)


@contextmanager
def filling(
    model: nn.Module, recording: Recording, random_state: Tensor
) -> Iterator[Callable[[Callable[[Tensor, Tensor], None]], None]]:
    """A function that gives `model` its numbers, after this block has wrapped it: `fill(copy)`.

    Every parameter and buffer is allocated on the recording's device as it is now, sharded or whole; then
    `copy(full, target)` is called with each one's numbers, one at a time. They are drawn from `random_state`; the
    generator itself is left as it is.
    """
    _refuse_plain_attributes(model)
    places = {name: Place.of(tensor) for name, tensor in _named_tensors(model)}
    filled = {name for name, _ in model.named_parameters(remove_duplicate=False)} if recording.empty else set()

    def fill(copy: Callable[[Tensor, Tensor], None]) -> None:
        _allocate(model, recording.device)
        takers: dict[int, list[tuple[Place, Tensor]]] = defaultdict(list)
        for name, target in _named_tensors(model):
            if name in filled:
                mark_empty(target)
            else:
                takers[places[name].memory].append((places[name], target))
        before = _random_state(recording.device)
        _set_random_state(recording.device, random_state)
        try:
            recording.play({memory: _giver(taking, copy) for memory, taking in takers.items()})
        finally:
            _set_random_state(recording.device, before)

    yield fill


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give every tensor of `model` memory; parameters that were tied still are."""
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    model.to_empty(device=device)
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


def _giver(taking: list[tuple[Place, Tensor]], copy: Callable[[Tensor, Tensor], None]) -> _Sink:
    def give(memory: torch.UntypedStorage) -> None:
        for place, target in taking:
            copy(place.within(memory), target)

    return give


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for item in tree for tensor in _tensors(item)] if isinstance(tree, list | tuple) else []


def _placed(tree: Any) -> Any:
    """`tree` with meta tensors replaced by their places and others kept as they are now."""

    def one(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return Place.of(item) if item.is_meta else item.detach().clone()

    return tree_map(one, tree)


def _places(tree: Any) -> list[Place]:
    found: list[Place] = []
    tree_map(lambda item: found.append(item) if isinstance(item, Place) else None, tree)
    return found


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
