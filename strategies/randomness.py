"""Random draws that are a function of numbers, without disturbing the generators that the loop draws from."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinMethodType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

_MAX_DEPTH = 4  # a sampler in a batch sampler in one of the user's own
_MAX_ITEMS = 64  # of a list in which generators are looked for: data have more
_LEAVES = (str, bytes, int, float, complex, NoneType, type, ModuleType, np.ndarray, torch.Tensor)


def derive(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of `numbers` and on their order."""
    words = np.random.SeedSequence([number & (2**64 - 1) for number in numbers]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators of this process, on the CPU."""
    random.seed(seed)
    np.random.seed(seed & (2**32 - 1))
    torch.default_generator.manual_seed(seed)


def states() -> tuple[Any, Any, Any]:
    """The states of Python's, NumPy's and torch's generators, for `set_states`."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_states(kept: tuple[Any, Any, Any]) -> None:
    """Make the generators what they were when `states` was called."""
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


@contextmanager
def undrawn(resumed: bool) -> Iterator[None]:
    """Leave torch's generator alone where a pass goes on: making its iterator drew a number when it began."""
    if not resumed:
        yield
        return
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def seeded(seed: int, *holders: object) -> Iterator[None]:
    """A block in which draws are a function of `seed`, and after which all generators are as they were.

    That holds for the global ones on the CPU, and for generators of Python, NumPy or torch that any of `holders`
    keeps in an attribute, or a sampler within it does.
    """
    kept = states()
    restore = [restorer for holder in holders for restorer in _take_over(holder, seed, 0)]
    seed_all(seed)
    try:
        yield
    finally:
        set_states(kept)
        for undo in restore:
            undo()


def _take_over(holder: object, seed: int, depth: int) -> Iterator[Callable[[], None]]:
    """Seed the generators in `holder`; what makes each what it was."""
    if isinstance(holder, torch.Generator):
        before = holder.get_state()
        holder.manual_seed(derive(seed, depth))
        yield lambda: _ignore(holder.set_state(before))
    elif isinstance(holder, np.random.Generator):
        bits = holder.bit_generator
        kept = bits.state
        bits.state = type(bits)(derive(seed, depth)).state
        yield lambda: setattr(bits, "state", kept)
    elif isinstance(holder, np.random.RandomState):
        old = holder.get_state()
        holder.seed(derive(seed, depth) & (2**32 - 1))
        yield lambda: holder.set_state(old)
    elif isinstance(holder, random.Random):
        past = holder.getstate()
        holder.seed(derive(seed, depth))
        yield lambda: holder.setstate(past)
    elif isinstance(holder, Sampler) or depth == 0:
        for place, value in enumerate(getattr(holder, "__dict__", {}).values()):
            if depth < _MAX_DEPTH:
                yield from _take_over(value, derive(seed, place), depth + 1)


def _ignore(value: object) -> None:
    """Make a function of one that returns something."""


def generators_in(holders: Iterable[Any]) -> Iterator[Any]:
    """Generators of Python, NumPy and torch that objects hold, however deep, each once and always in the same order.

    They are looked for in attributes and slots, short lists, tuples and dictionaries, partials, the object of a method,
    and what a function has closed over. Not in sets, the globals of a function, modules, and classes.
    """
    waiting, seen = list(holders)[::-1], set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen or isinstance(holder, _LEAVES):
            continue
        seen.add(id(holder))
        if isinstance(holder, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield holder
        else:
            waiting.extend(reversed(_parts(holder)))


def _parts(holder: Any) -> list[Any]:
    if isinstance(holder, dict | list | tuple):
        values = list(holder.values()) if isinstance(holder, dict) else list(holder)
        return values if len(values) <= _MAX_ITEMS else []
    if isinstance(holder, CellType):
        return _attributes(holder, ["cell_contents"])
    parts = list(getattr(holder, "__dict__", {}).values())
    if isinstance(holder, FunctionType):
        return parts + _attributes(holder, ["__closure__", "__defaults__", "__kwdefaults__"])
    if isinstance(holder, MethodType | BuiltinMethodType):  # a collate function, say
        return parts + _attributes(holder, ["__self__", "__func__"])
    if isinstance(holder, functools.partial):
        return parts + _attributes(holder, ["func", "args", "keywords"])
    own = [vars(kind) for kind in type(holder).__mro__ if "__slots__" in vars(kind)]
    slots = [name for names in own for name, value in names.items() if isinstance(value, MemberDescriptorType)]
    return parts + _attributes(holder, slots)


def _attributes(holder: Any, names: Iterable[str]) -> list[Any]:
    """Those of them that are set."""
    unset = object()
    return [value for name in names if (value := getattr(holder, name, unset)) is not unset]
