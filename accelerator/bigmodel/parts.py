"""A model as the parts that are placed as one: blocks, the modules outside them, and tensors of containers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accelerator.byte_sizes import in_words
from strategies import blocks
from strategies.errors import ConfigurationError
from strategies.shards import is_quantized

Classes = str | type[nn.Module] | Sequence[str | type[nn.Module]]  # of modules that stay whole, or their names


@dataclass(eq=False)
class Part:
    """Modules whose weights come and go together. More than one name means that they are tied."""

    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)  # running one of them needs the tensors
    tensors: list[Tensor] = field(default_factory=list)  # each once

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the tensors, floating-point ones in `dtype`."""
        return sum(size_of(tensor, dtype) for tensor in self.tensors)

    @property
    def fetched(self) -> list[nn.Parameter]:
        """Its parameters that come and go where it rests: not the few that are trained in a part that is frozen."""
        parameters = [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        return frozen if 2 * _bytes(frozen) >= _bytes(parameters) else parameters

    @property
    def fetched_bytes(self) -> int:
        """Bytes of what comes and goes."""
        return _bytes(self.fetched)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(size_of(tensor) for tensor in tensors)


def size_of(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a tensor, in `dtype` if it is floating-point."""
    if is_quantized(tensor):
        inner: Any = tensor
        return sum(size_of(getattr(inner, name)) for name in inner.__tensor_flatten__()[0])
    return tensor.numel() * (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `ConfigurationError` if this is no dtype for weights."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigurationError(
            f"dtype is {dtype!r}; expected a floating-point one, such as torch.bfloat16 (in 8 or 4 bits: quantize=)"
        )


def parts_of(model: nn.Module, no_split_classes: Classes | None = None, named: Collection[str] = ()) -> list[Part]:
    """The parts of `model` in the order in which they are defined; every parameter and buffer is in exactly one.

    Modules of `no_split_classes` are kept whole (`None`: the blocks that a model of transformers declares, else its
    repeated ones), but for those inside which `named` names something. Parts that share a tensor are one.
    """
    if no_split_classes is None:
        chosen = blocks.automatic(model)
    else:
        classes = [no_split_classes] if isinstance(no_split_classes, str | type) else no_split_classes
        names = [one.__name__ if isinstance(one, type) else one for one in classes]
        chosen = blocks.by_class(model, names, "no_split_classes")
    whole = {id(module) for _, module in chosen}
    above = {name[:end] for name in named for end, letter in enumerate(name) if letter == "."}
    found: list[Part] = []
    holder: dict[int, Part] = {}  # of each tensor
    for name, module, tensors in _atoms("", model, whole, above | ({""} if any(named) else set())):
        tied = list(dict.fromkeys(holder[id(tensor)] for tensor in tensors if id(tensor) in holder))
        part = tied[0] if tied else Part()
        for other in tied[1:]:
            found.remove(other)
            part.names += other.names
            part.modules += other.modules
            part.tensors += other.tensors
            holder |= {id(tensor): part for tensor in other.tensors}
        if not tied:
            found.append(part)
        part.names.append(name)
        if module not in part.modules:
            part.modules.append(module)
        part.tensors += {id(tensor): tensor for tensor in tensors if id(tensor) not in holder}.values()
        holder |= {id(tensor): part for tensor in tensors}
    return found


def running_around(parts: Sequence[Part]) -> list[list[int]]:
    """The other parts whose modules run while a part does, by index: containers with tensors of their own."""
    parts_with: dict[int, list[int]] = {}  # a module, by its id
    for index, part in enumerate(parts):
        for module in part.modules:
            parts_with.setdefault(id(module), []).append(index)
    around: list[set[int]] = [set() for _ in parts]
    for index, part in enumerate(parts):
        for inner in (inner for module in part.modules for inner in module.modules()):
            for other in parts_with.get(id(inner), ()):
                around[other].add(index)
    return [sorted(others - {index}) for index, others in enumerate(around)]


def described(index: int, parts: Sequence[Part], sizes: Sequence[int], around: Sequence[Sequence[int]]) -> str:
    """A part with its bytes, and those that run around it."""
    words = f"{parts[index].names[0] or 'the model'!r} of {in_words(sizes[index])} ({sizes[index]} bytes)"
    others = [other for other in around[index] if sizes[other]]
    if others:
        total = sizes[index] + sum(sizes[other] for other in others)
        names = ", ".join(f"{parts[other].names[0]!r} of {in_words(sizes[other])}" for other in others)
        words += f" together with what runs around it, {names} ({total} bytes in all)"
    return words


def _atoms(
    name: str, module: nn.Module, whole: set[int], above: set[str]
) -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    children = [(child_name, child) for child_name, child in module._modules.items() if child is not None]
    if name not in above and (id(module) in whole or not children):
        tensors = [*module.parameters(), *module.buffers()]
        if tensors:
            yield name, module, tensors
        return
    prefix = f"{name}." if name else ""
    for attribute, tensor in _own(module):
        yield f"{prefix}{attribute}", module, [tensor]
    for child_name, child in children:
        yield from _atoms(f"{prefix}{child_name}", child, whole, above)


def _own(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    # Under all names, also those of a module or tensor that has several: a device map has to cover them.
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
