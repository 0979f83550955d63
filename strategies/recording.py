"""What was done to build a model on the meta device, written down so that it can be done again for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors  # what torch.device as a context changes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .errors import PrepareError

# Fills by rejection, drawing until nothing is rejected; `torch.nn.init` calls it by this name.
TRUNC_NORMAL = "_no_grad_trunc_normal_"
trunc_normal = getattr(torch.nn.init, TRUNC_NORMAL)
Sink = Callable[[torch.UntypedStorage], None]
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
    trunc_normal,
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
        self.random_state = random_state(device)
        self._calls: list[_Call] = []
        self._versions: dict[int, int] = {}  # of every tensor, how often it was written to in the block
        self._alive: list[Tensor] = []  # so that no memory is given the address of an earlier one
        self._memories: set[int] = set()

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down one call, after it ran on meta tensors."""
        made = [tensor for tensor in _tensors(result) if tensor.is_meta]
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in self._memories]
        if _is_seeded(function):
            self._check_random(function, args, kwargs, made)
        if not new and not (function._schema.is_mutable and made):
            return  # a view, or nothing to do with the model
        self._append(_Call(function, _placed(args), _placed(kwargs), [Place.of(tensor) for tensor in new]))
        self._alive += new

    def _check_random(self, function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        if not made and self.empty:  # it keeps its numbers and its memory, and nothing else will draw the usual ones
            self.random_state = random_state(self.device)
            return
        if not made:
            raise PrepareError(
                f"{function} drew random numbers for a tensor on a real device inside init_module(), where tensors are "
                "made later, one at a time. Leave the device to init_module(), or build the model outside it."
            )
        if any(isinstance(item, torch.Generator) for item in [*args, *kwargs.values()]):
            raise PrepareError(
                f"{function} drew from a generator of its own inside init_module(), where tensors are made later. Draw "
                "from torch's own generator, or build the model outside it."
            )
        if not torch.equal(random_state(self.device), self.random_state):
            raise PrepareError(
                "the random generator was seeded inside init_module(), where tensors are made later. Seed it before, "
                "or build the model outside."
            )

    def note_filling(self, function: Any, tensor: Tensor, args: Any, kwargs: Any) -> None:
        """Write down one call that fills the meta tensor `tensor`, as a whole: it cannot run without numbers."""
        self._check_random(function, args, kwargs, [tensor])
        self._append(_Call(function, (Place.of(tensor), *args), kwargs, []))

    def _append(self, call: _Call) -> None:
        places = _places((call.args, call.kwargs))
        call.touched = {place.memory for place in [*places, *call.made]}
        target = call.args[0] if call.function in OVERWRITING and call.args else None
        if isinstance(target, Place) and target.is_all and [p.memory for p in places].count(target.memory) == 1:
            call.overwrites = target.memory
        self._calls.append(call)
        self._memories.update(place.memory for place in call.made)

    @property
    def constants(self) -> list[Tensor]:
        """The real tensors that the operations use, such as those made from numbers of NumPy."""
        found: list[Tensor] = []
        for call in self._calls:
            tree_map(lambda item: found.append(item) if isinstance(item, Tensor) else None, (call.args, call.kwargs))
        return found

    def end(self, model_tensors: Iterable[Tensor]) -> None:
        """Note how often each tensor was written to until now, the end of the block."""
        self._versions = {id(tensor): _num_writes(tensor) for tensor in model_tensors}

    def was_changed(self, tensor: Tensor) -> bool:
        """Whether a tensor was written to after the block."""
        return self._versions.get(id(tensor), _num_writes(tensor)) != _num_writes(tensor)

    def value_of(self, tensor: Tensor) -> Tensor:
        """The numbers that a meta tensor will have. Raises `PrepareError` if they are random."""
        place = Place.of(tensor)
        calls = self._needed_for({place.memory})
        if any(_is_seeded(call.function) for call in calls):
            if self.empty:
                raise PrepareError(
                    "the model's constructor looks at a number of a weight (.item(), bool(), tolist()), and in this "
                    "block (init_empty_weights(), or init_module() with empty weights) weights have none before they "
                    "are loaded. Build this model outside of it."
                )
            raise PrepareError(
                "the model's constructor looks at a random number of a tensor (.item(), bool(), tolist()), which "
                "inside init_module() is only drawn by prepare(). Build this model outside init_module()."
            )
        real: dict[int, torch.UntypedStorage] = {}
        with default_dtype(self.dtype), torch.no_grad():
            for call in calls:
                self._run(call, real)
        return place.within(real[place.memory])

    def _needed_for(self, memories: set[int]) -> list[_Call]:
        """The operations that these memories depend on."""
        needed = set(memories)
        found = []
        for call in reversed(self._calls):
            if call.touched & needed:
                needed |= call.touched
                found.append(call)
        return found[::-1]

    def holds(self, tensor: Tensor) -> bool:
        """Whether this recording made the memory of a meta tensor."""
        return tensor.untyped_storage()._cdata in self._memories

    def play(self, sinks: Mapping[int, Sink]) -> None:
        """Run every operation again, for real; give each memory in `sinks` to its sink when it is final.

        A recording that is `empty` draws no numbers that nobody takes: it runs only what the sinks need.
        """
        calls = self._needed_for(set(sinks)) if self.empty else self._calls
        next_use: list[dict[int, _Call | None]] = []
        later: dict[int, _Call] = {}
        for call in reversed(calls):
            next_use.append({memory: later.get(memory) for memory in call.touched})
            later |= dict.fromkeys(call.touched, call)
        real: dict[int, torch.UntypedStorage] = {}
        with default_dtype(self.dtype), torch.no_grad():
            for call, following in zip(calls, reversed(next_use), strict=True):
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


class Recorder(TorchDispatchMode):
    """Passes every operation on and has it written down."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch would import its compiler to say so: seconds, and 70 MB

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return self._recording.value_of(args[0]).item()
        result = func(*args, **(kwargs or {}))
        self._recording.note(func, args, kwargs or {}, result)
        return result


class AsIfReal(TorchFunctionMode):
    """Makes tensors on the meta device, and lets constructors work on them as on real ones.

    `torch.device("meta")` does less: libraries ask for it and leave their initialisation out, as `torch.nn.init`
    does for meta tensors, and `torch.tensor` loses its values.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].device.type == "meta":
            return func(self._recording.value_of(args[0].detach()), *args[1:], **kwargs)
        if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]  # a property in C
            return False
        if func in _device_constructors() and kwargs.get("device") is None:
            if func not in (torch.tensor, torch.as_tensor, torch.asarray):
                return func(*args, **{**kwargs, "device": "meta"})
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to("meta") if made.numel() else made  # an empty one is made to see what is the default device
        return func(*args, **kwargs)


def _is_seeded(function: Any) -> bool:
    return function is trunc_normal or torch.Tag.nondeterministic_seeded in function.tags


def _num_writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count


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


def random_state(device: torch.device) -> Tensor:
    """The state of the device's generator."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put the device's generator into `state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors of `dtype` in this block, where nothing else is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
