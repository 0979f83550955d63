"""How tensors lie on the devices of one process: batches cut, parameters cut or copied, ties kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PrepareError, StepError

_AXES = ("data", "fsdp")
_PREPARED = "_prepared_for_xla"  # an attribute of parameters


@dataclass(frozen=True)
class Layout:
    """`copies` of the model, each cut over `parts` devices; parameters below `min_elements` are not cut."""

    copies: int
    parts: int
    min_elements: int

    @cached_property
    def mesh(self) -> Any:
        """The mesh of torch_xla, shape (copies, parts)."""
        import torch_xla.distributed.spmd as xs

        return xs.Mesh(np.arange(self.copies * self.parts), (self.copies, self.parts), _AXES)

    def place_batch(self, tensor: Tensor) -> None:
        """Cut `tensor` along its first dimension, over all devices. Lengths that do not divide are padded by XLA."""
        if tensor.ndim and len(tensor):
            self._mark(tensor, (_AXES, *[None] * (tensor.ndim - 1)))

    def place_parameters(self, model: nn.Module) -> None:
        """Cut every parameter that is to be cut, and copy the others, and buffers, to every device."""
        for tensor in (*model.parameters(), *model.buffers()):
            dim = self._dim_of(tensor) if isinstance(tensor, nn.Parameter) else None
            self._mark(tensor, tuple("fsdp" if number == dim else None for number in range(tensor.ndim)))

    def is_cut(self, parameter: Tensor) -> bool:
        """Whether `parameter` is cut, and not copied."""
        return self._dim_of(parameter) is not None

    def describe(self, model: nn.Module) -> dict[str, str]:
        """The mesh and what is cut, for people."""
        parameters = list(model.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        cut = sum(parameter.numel() for parameter in parameters if self.is_cut(parameter))
        copies = "1 copy" if self.copies == 1 else f"{self.copies} copies"
        return {
            "mesh": f"{copies} of the model over {self.parts} device{'s' if self.parts > 1 else ''} each",
            "cut": f"{cut} of {total} elements" if self.parts > 1 else "nothing",
        }

    def _dim_of(self, parameter: Tensor) -> int | None:
        """The dimension that is cut: the longest that divides evenly, else the longest."""
        if self.parts == 1 or parameter.numel() < self.min_elements:
            return None
        fitting = [dim for dim, length in enumerate(parameter.shape) if length >= self.parts]
        even = [dim for dim in fitting if parameter.shape[dim] % self.parts == 0]
        return max(even or fitting, key=lambda dim: parameter.shape[dim], default=None)

    def _mark(self, tensor: Tensor, spec: tuple[Any, ...]) -> None:
        import torch_xla

        if tensor.ndim:  # scalars are on every device anyway
            torch_xla._XLAC._xla_mark_sharding(tensor, self.mesh.get_op_sharding(spec))


def lay_out_like(tensor: Tensor, like: Tensor) -> None:
    """Lay `tensor`, on the device of torch_xla and of the shape of `like`, over devices as `like` is."""
    import torch_xla

    sharding = torch_xla._XLAC._get_xla_op_sharding(like)
    if sharding is not None:
        torch_xla._XLAC._xla_mark_sharding(tensor, sharding)


def on_host(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, on the device of torch_xla, whole in CPU memory.

    Put together here from what each device holds: `tensor.cpu()` compiles a program that puts it together on each.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm
    from torch_xla.distributed.spmd import ShardingType, wrap_if_sharded

    tensor = tensor.detach()
    if torch_xla._XLAC._get_xla_sharding_type(tensor) in (None, ShardingType.REPLICATED.value):
        return tensor.cpu()
    xm.wait_device_ops()  # of what is still running, there are no parts yet
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in wrap_if_sharded(tensor).local_shards:
        own = tuple(slice(0, part.stop - part.start) for part in shard.indices)  # without the compiler's padding
        copied[tuple(shard.indices)] = shard.data[own]
    return copied


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` in place. Its parameters are replaced; their ties and Python attributes are kept.

    Raises `PrepareError` for a parameter with hooks, which would be lost.
    """
    before = dict(model.named_parameters())
    hooked = [name for name, old in before.items() if old._backward_hooks or old._post_accumulate_grad_hooks]
    if hooked:
        raise PrepareError(
            f"{hooked[0]} of {type(model).__name__} has hooks, and moving it to torch_xla makes a new parameter "
            "without them. Register hooks on the parameters of the model that prepare() returned."
        )
    ties = ties_of(model)
    model = model.to(device)
    re_tie(model, ties)
    for name, parameter in model.named_parameters():
        vars(parameter).update(vars(before[name]))
        setattr(parameter, _PREPARED, (parameter.device, parameter.dtype))
    return model


def refuse_others(model: nn.Module) -> None:
    """Raise `StepError` for a parameter that `move_model` did not move: no optimizer knows it, nor is it laid out.

    And for one that has another device or dtype since.
    """
    for name, parameter in model.named_parameters():
        prepared, now = getattr(parameter, _PREPARED, None), (parameter.device, parameter.dtype)
        if prepared is not None and prepared != now:
            raise StepError(
                f"{name} of {type(model).__name__} was prepared as {prepared[1]} on {prepared[0]} and is {now[1]} on "
                f"{now[0]} now. Convert the model before prepare(); for precision, Accelerator(mixed_precision='bf16')."
            )
        if prepared is None:
            raise StepError(
                f"{name} of {type(model).__name__} is not the parameter that was prepared: it was added or replaced "
                "since, and the optimizer does not know it. Change the model before prepare(), or write into the "
                "parameter: parameter.data.copy_(value)."
            )


def ties_of(model: nn.Module) -> list[list[str]]:
    """Names of each parameter or buffer that has several, first name first."""
    names: dict[int, list[str]] = {}
    for name, tensor in _all_named(model):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def re_tie(model: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Put what has the first name of each group under its other names too."""
    for first, *others in ties:
        owner, name = _owner(model, first)
        tensor = getattr(owner, name)
        for other in others:
            owner, name = _owner(model, other)
            setattr(owner, name, tensor)


def _all_named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, name = path.rpartition(".")
    return model.get_submodule(module), name
