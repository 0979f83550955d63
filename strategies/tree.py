"""Walk any nesting of containers and apply a function to the tensors in it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor


def map_tensors(function: Callable[[Any], Any], tree: Any, kind: type = Tensor) -> Any:
    """The same nesting as `tree`, with `function` applied to every tensor and all else kept as it is.

    Walks lists, tuples, named tuples, mappings of any class and dataclass instances. Containers are
    rebuilt, never changed in place; anything else is passed through by reference. `kind` is the class
    of the leaves, where they are not tensors.
    """
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return _rebuild_mapping(tree, {key: map_tensors(function, value, kind) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value, kind) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value, kind) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        rebuilt = copy.copy(tree)
        for field in dataclasses.fields(tree):
            # object.__setattr__ so that frozen dataclasses and fields with init=False are rebuilt too
            object.__setattr__(rebuilt, field.name, map_tensors(function, getattr(tree, field.name), kind))
        return rebuilt
    return tree


def iterate_leaves(tree: Any) -> Iterator[Any]:
    """Everything in `tree` that is no container."""
    if isinstance(tree, Mapping):
        children = list(tree.values())
    elif isinstance(tree, list | tuple):
        children = list(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    else:
        yield tree
        return
    for child in children:
        yield from iterate_leaves(child)


def describe(tree: Any, any_length_of: int | Literal["all"] | None = None) -> str:
    """The nesting, shapes and dtypes of `tree` in one line, equal for trees that a collective may put together.

    The length of dimension `any_length_of` of each tensor, or of all, is left out.
    """
    if isinstance(tree, Tensor) and tree.is_nested:
        return f"nested {tree.dtype}".replace("torch.", "")
    if isinstance(tree, Tensor):
        free = range(tree.ndim) if any_length_of == "all" else [any_length_of]
        lengths = ["*" if dim in free else str(length) for dim, length in enumerate(tree.shape)]
        inside = f"{lengths[0]}," if tree.ndim == 1 else ", ".join(lengths)
        return f"({inside}) {tree.dtype}".replace("torch.", "")
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value, any_length_of)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        opening, closing = "[]" if isinstance(tree, list) else "()"
        return opening + ", ".join(describe(value, any_length_of) for value in tree) + closing
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        named = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return type(tree).__name__ + describe(named, any_length_of)
    return type(tree).__name__


def iterate_tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of `tree`, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []
    _collect(tree, found)
    return iter(found)


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _collect(value, found)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            _collect(value, found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            _collect(getattr(tree, field.name), found)


def move(tree: Any, device: torch.device) -> Any:
    """`tree` with every tensor on `device`; objects that are no known container but have `.to` move themselves.

    Copies from pinned memory do not block.
    """
    if isinstance(tree, Tensor):
        may_overlap = device.type not in ("cpu", "xla") and tree.device.type == "cpu"
        return tree.to(device, non_blocking=may_overlap and tree.is_pinned())
    if type(tree) is list or type(tree) is tuple:  # the usual batch, before anything is looked up
        return type(tree)([move(value, device) for value in tree])
    if callable(getattr(tree, "to", None)) and not isinstance(tree, type):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return _rebuild_mapping(tree, {key: move(value, device) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(move(value, device) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(move(value, device) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        rebuilt = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(rebuilt, field.name, move(getattr(tree, field.name), device))
        return rebuilt
    return tree


def num_samples(batch: Any) -> int | None:
    """The first dimension of the first tensor that has one, which a collated batch shares; `None` without any."""
    for tensor in iterate_tensors(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    return None


def _rebuild_mapping(original: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return values
    if not isinstance(original, MutableMapping):
        return type(original)(values)  # type: ignore[call-arg]  # an immutable mapping's constructor takes one
    rebuilt = copy.copy(original)
    for key, value in values.items():  # not update(): the outputs of transformers' models refuse it
        rebuilt[key] = value
    return rebuilt
