"""Which modules of a model are sharded as one: gathered together before they run, released after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from .errors import PrepareError, nearest

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Block:
    """One module that is sharded as a whole, and the parameters that are its own: those of no inner block."""

    name: str  # as in `named_modules()`; "" is the model itself
    module: nn.Module
    parameters: tuple[tuple[str, Parameter], ...]

    @property
    def num_elements(self) -> int:
        """Elements of the parameters."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def class_name(module: object) -> str:
    """The name of the user's class; a view, and `fully_shard`, put a class of their own in front."""
    kind = type(module)
    while kind.__bases__[0].__name__ in ("PreparedModel", "FSDPModule") and len(kind.__bases__) > 1:
        kind = kind.__bases__[1]
    return kind.__name__


def find_blocks(model: nn.Module, chosen: Sequence[tuple[str, nn.Module]], ignored: set[Parameter]) -> list[Block]:
    """The chosen modules as blocks, inner ones first and the model itself last.

    Raises `PrepareError` for a parameter that would lie in two blocks, and for a block of several dtypes.
    """
    names = {id(module): name for name, module in [*chosen, ("", model)]}
    owners: dict[Parameter, dict[int, str]] = {}  # of each parameter, its blocks and its name in each
    for name, parameter, block in _with_block(model, "", id(model), names):
        if parameter not in ignored:
            owners.setdefault(parameter, {}).setdefault(block, name)
    held: dict[int, list[tuple[str, Parameter]]] = {key: [] for key in names}
    for parameter, places in owners.items():
        if len(places) > 1:
            listed = " and ".join(places.values())
            inside = " and ".join(names[block] or "the rest of the model" for block in places)
            raise PrepareError(
                f"{listed} of {type(model).__name__} are one tied parameter, but would be sharded twice, with "
                f"{inside}. Choose blocks of which at most one holds it, such as auto_wrap_policy='transformer' "
                "with the class of the repeated layers."
            )
        ((block, name),) = places.items()
        held[block].append((name, parameter))
    blocks = [
        Block(name, model.get_submodule(name), tuple(held[key]))
        for key, name in sorted(names.items(), key=lambda item: -(item[1].count(".") + 1 if item[1] else 0))
    ]
    for one in blocks:
        _refuse_mixed_dtypes(one)
    return [one for one in blocks if one.parameters or not one.name]


def _with_block(
    module: nn.Module, prefix: str, block: int, names: dict[int, str]
) -> Iterator[tuple[str, Parameter, int]]:
    """Every parameter under every name it has, with the innermost chosen module around it."""
    if id(module) in names:
        block = id(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", parameter, block
    for name, child in module._modules.items():
        if child is not None:
            yield from _with_block(child, f"{prefix}{name}.", block, names)


def _refuse_mixed_dtypes(block: Block) -> None:
    by_dtype: dict[torch.dtype, str] = {}
    for name, parameter in block.parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, name)
    if len(by_dtype) > 1:
        listed = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in by_dtype.items())
        raise PrepareError(
            f"trainable parameters of {block.name or 'the model outside its blocks'} have several dtypes ({listed}), "
            "which cannot be sharded together. Cast them to one dtype before prepare()."
        )


def refuse_caches(model: nn.Module) -> None:
    """Raise `PrepareError` for a model of `transformers` whose blocks write to a cache: they will run twice."""
    names = [name for name, part in model.named_modules() if getattr(getattr(part, "config", None), "use_cache", False)]
    if names:
        places = ", ".join(f"model{'.' + name if name else ''}.config" for name in names[:1] + names[-1:])
        raise PrepareError(
            f"activation_checkpointing computes the blocks of {type(model).__name__} twice, and its cache of keys and "
            f"values would take them in twice. Set use_cache = False in the config of every part ({places}, ...)."
        )


def refuse_backend(name: str) -> None:
    """Raise `PrepareError` for a backend that `torch.compile` does not have: it would say so in the first forward."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise PrepareError(f"compile_backend is {name!r}; expected one of {', '.join(known)}.{nearest(name, known)}")


def refuse_embeddings(model: nn.Module) -> None:
    """Raise `PrepareError` for an embedding whose forward writes into its weights: only a gathered copy would change.

    And for one with sparse gradients.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.sparse:
            raise PrepareError(
                f"{name} of {type(model).__name__} has sparse=True, and fully_shard cannot reduce sparse gradients. "
                "Leave it out, or use DDP."
            )
        if module.max_norm is not None:
            raise PrepareError(
                f"{name} of {type(model).__name__} has max_norm={module.max_norm}: its forward writes into its "
                "weights, which is lost where they are sharded. Normalise the embedding's output, or use DDP."
            )


def by_class(
    model: nn.Module, names: Sequence[str], setting: str = "transformer_layer_cls"
) -> list[tuple[str, nn.Module]]:
    """The modules of these classes. Raises `PrepareError` for a class that the model has none of."""
    found = [(name, module) for name, module in _candidates(model) if _is_one_of(module, names)]
    for name in names:
        if not any(_is_one_of(module, [name]) for _, module in found):
            if any(_is_one_of(module, [name]) for module in model.modules()):
                raise PrepareError(
                    f"{setting} names {name!r}, but what is a {name} in {class_name(model)} has no forward "
                    "or no parameters: nothing would gather it. Name the class of the modules inside that are called."
                )
            classes = Counter(type(module).__name__ for _, module in _candidates(model))
            listed = ", ".join(f"{cls} ({count})" for cls, count in classes.most_common(12))
            raise PrepareError(
                f"{setting} names {name!r}, but {type(model).__name__} has no module of that class; "
                f"expected one of {listed}."
            )
    return found


def by_size(model: nn.Module, minimum: int) -> list[tuple[str, nn.Module]]:
    """The smallest modules that hold at least `minimum` elements of parameters outside smaller chosen ones."""
    chosen: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> int:
        left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for child_name, child in module.named_children():
            left += visit(f"{name}.{child_name}" if name else child_name, child)
        if name and left >= minimum and has_forward(module):
            chosen.append((name, module))
            return 0
        return left

    visit("", model)
    return chosen


def by_predicate(model: nn.Module, predicate: Predicate) -> list[tuple[str, nn.Module]]:
    """The modules that `predicate(name, module)` chooses. Raises `PrepareError` if it chooses none."""
    found = [(name, module) for name, module in _candidates(model) if predicate(name, module)]
    if not found:
        raise PrepareError(
            f"auto_wrap_policy chose no module of {type(model).__name__}. Use 'none' to shard it as one block."
        )
    return found


def automatic(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that a model of `transformers` declares, else its repeated ones: several of one class in a list."""
    declared = getattr(model, "_no_split_modules", None) or ()
    found = [(name, module) for name, module in _candidates(model) if _is_one_of(module, list(declared))]
    return found or [*_repeated(model, "")]


def _repeated(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    in_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    counted = Counter(type(child) for _, child in children if next(child.children(), None) is not None)
    for name, child in children:
        full = f"{prefix}{name}"
        if in_list and counted[type(child)] > 1 and has_forward(child) and _has_parameters(child):
            yield full, child
        else:
            yield from _repeated(child, f"{full}.")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name and has_forward(module) and _has_parameters(module):
            yield name, module


def has_forward(module: nn.Module) -> bool:
    """Whether a call of `module` can gather its parameters; a container, of torch or the user's own, is not called."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_one_of(module: nn.Module, names: Sequence[Any]) -> bool:
    return any(cls.__name__ in names for cls in type(module).__mro__)


def describe(blocks: Sequence[Block], shard: int) -> str:
    """How the model is cut, in one line: each kind of block, how many there are and how large they are."""
    kinds: Counter[tuple[str, int]] = Counter()
    for block in blocks:
        kind = class_name(block.module)
        kinds[kind if block.name else f"the rest of {kind}", block.num_elements] += 1
    parts = [
        f"{count} x {kind} of {size:,}" if count > 1 else f"{kind} of {size:,}" for (kind, size), count in kinds.items()
    ]
    whole = sum(block.num_elements for block in blocks)
    return f"{' + '.join(parts)} parameters; {math.ceil(whole / shard):,} of {whole:,} on each rank"
