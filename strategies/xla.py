"""All devices of a host from one process, through torch_xla: one recorded program per accumulation window."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from . import blocks, xla_runtime
from .base import NOTHING, Strategy
from .errors import ConfigurationError, DataError, PrepareError
from .field_types import check_types
from .init_module import born_on
from .precision import Precision
from .recompilation import Recompilations
from .tree import iterate_tensors, move
from .unbiased_variance import correct_running_variance
from .world import World
from .xla_checkpointing import recompute_in_backward
from .xla_layout import Layout, lay_out_like, move_model, refuse_others
from .xla_refusals import explain, refuse_inference_mode, refuse_unknown

Shard = Literal["none", "data", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class XLAWorld(World):
    """A world of one process and the devices that it drives. `layout` is `None` for one device."""

    num_devices: int = 1
    layout: Layout | None = None
    recompilations: Recompilations = field(default_factory=Recompilations, compare=False, repr=False)


@dataclass(frozen=True)
class XLA(Strategy):
    """torch_xla in one process: TPUs, or whatever else `PJRT_DEVICE` names.

    Operations are recorded as they are called, compiled once per shape, and run when a window closes. Over several
    devices it is one program (GSPMD; Xu et al. 2021, arXiv:2105.04663): a batch is that of all devices together.

    `shard`: `"none"` uses one device; `"data"` cuts batches over all devices and copies the model to each; `"fsdp"`
    also cuts parameters, gradients and optimizer state.
    `mesh`: for `"fsdp"`, copies of the model and devices that each is cut over; `None` is one copy over all.
    `min_sharded_elements`: smaller parameters stay whole on every device.
    `activation_checkpointing`: whether blocks are computed again in backward (Chen et al. 2016, arXiv:1604.06174):
    modules of the classes `transformer_layer_cls`, or of at least `min_num_params` elements; without either, the
    blocks that a model of transformers declares, else the repeated ones.
    `full_graph`: as in `torch_xla.compile`: reading a value inside a window is an error there and then, and not a
    warning later. The window is compiled as one program in any case.

    In the words of existing configurations, which `accelerator config convert` translates: `xla: true` is
    `shard="fsdp"`, `xla_fsdp_grad_ckpt` is `activation_checkpointing`, with `transformer_layer_cls_to_wrap` or
    `min_num_params` for its blocks; `compute_dtype` of `xla_fsdp_settings` is `mixed_precision`, `sharding_groups` is
    `mesh`, and the rest, on how collectives are issued, is the compiler's.
    """

    single_process: ClassVar[bool] = True

    shard: Shard = "data"
    mesh: tuple[int, int] | None = None
    min_sharded_elements: int = 1024
    activation_checkpointing: bool = False
    transformer_layer_cls: tuple[str, ...] = ()
    min_num_params: int = 0
    full_graph: bool = False

    def __post_init__(self) -> None:
        check_types(self, XLA)
        if self.mesh is not None and self.shard != "fsdp":
            raise ConfigurationError(
                f"mesh is {self.mesh} and shard is {self.shard!r}; expected shard='fsdp' with a mesh: (copies of the "
                "model, devices that each is cut over)"
            )
        if self.mesh is not None and min(self.mesh) < 1:
            raise ConfigurationError(f"mesh is {self.mesh}; expected two numbers >= 1, such as (2, 4)")
        if self.min_sharded_elements < 1:
            raise ConfigurationError(f"min_sharded_elements is {self.min_sharded_elements}; expected at least 1")
        self._refuse_unused_choice()

    def setup(self) -> World:
        """Start the runtime of torch_xla, before any backward, and lay its devices out in a mesh."""
        device, num_devices = xla_runtime.start(type(self).__name__, wants_mesh=self.shard != "none")
        if self.mesh is not None and self.mesh[0] * self.mesh[1] != num_devices:
            raise ConfigurationError(
                f"mesh is {self.mesh}, for {num_devices} devices; expected two numbers whose product is {num_devices}"
            )
        layout = None
        if self.shard != "none" and num_devices > 1:
            copies, parts = (num_devices, 1) if self.shard == "data" else self.mesh or (1, num_devices)
            layout = Layout(copies, parts, self.min_sharded_elements)
        return XLAWorld(device=device, num_devices=num_devices if layout else 1, layout=layout)

    def teardown(self, world: World) -> None:
        """The runtime lasts as long as the process."""

    def seed(self, value: int, world: World) -> None:
        """Seed the generator of the device."""
        xla_runtime.seed(value)

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        """Move the model to the device(s), tie again what was tied, and cut its parameters."""
        if self.activation_checkpointing:
            blocks.refuse_caches(model)
            recompute_in_backward(model, self._blocks(model))
        refuse_unknown(model, several_devices=_xla(world).layout is not None)
        model = move_model(model, world.device)
        correct_running_variance(model)
        layout = _xla(world).layout
        if layout is not None:
            self._refuse_uncut(model, layout)
            layout.place_parameters(model)
        return model

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The model itself."""
        return wrapped

    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        """torch's autocast for the device."""
        return torch.autocast(world.device.type, dtype=precision.dtype)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Devices exchange gradients where the compiler puts it, once in the window's program."""
        return NOTHING

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        """The program computes the mean over the whole batch. Parameters must be those that were prepared."""
        for model in wrapped:
            refuse_others(model)

    def discard_gradients(self, wrapped: nn.Module) -> None:
        """Nothing is kept outside `.grad`. The exception that is on its way is told what it may come from."""
        self._allow_reads(True)
        explain(sys.exc_info()[1], wrapped)

    def mark_step(self, world: World) -> None:
        """Run what was recorded."""
        recompilations = _xla(world).recompilations
        recompilations.before_run()
        self._allow_reads(True)
        xla_runtime.run_recorded()
        recompilations.after_run()

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        """Move each batch to the device, cut over all of them. An exception of the data passes through."""
        own = _xla(world)
        try:
            for batch in batches:
                refuse_inference_mode()
                own.recompilations.note_batch(batch)
                placed = move(batch, world.device)
                if own.layout is not None:
                    for tensor in iterate_tensors(placed):
                        own.layout.place_batch(tensor)
                if self.full_graph:
                    xla_runtime.allow_reads(not torch.is_grad_enabled())  # evaluation reads what it likes
                yield placed
        except RuntimeError as error:
            if "in DataLoader worker" in str(error) and xla_runtime.is_forbidden(error):
                raise DataError(
                    "a worker process of the loader used a device of torch_xla, and forked processes cannot: it would "
                    "hang there. Keep what the dataset and collate_fn use on the CPU; batches are moved here."
                ) from error
            raise
        finally:
            self._allow_reads(True)

    def open_gradients(self, wrapped: nn.Module, world: World) -> dict[str, Tensor]:
        """What an open window has summed, run in one program, so that it can be read tensor by tensor."""
        _xla(world).recompilations.leave_window()
        self._allow_reads(True)
        xla_runtime.run_recorded()
        return super().open_gradients(wrapped, world)

    def set_open_gradients(self, wrapped: nn.Module, gradients: Mapping[str, Tensor], world: World) -> None:
        """Go on with `gradients`, laid out over devices as their parameters are."""
        if gradients:
            _xla(world).recompilations.leave_window()
        super().set_open_gradients(wrapped, gradients, world)
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                lay_out_like(parameter.grad, parameter)

    def init_context(self, world: World, *, empty: bool) -> AbstractContextManager[Any]:
        """Parameters are born on the CPU, whose generator gives the numbers of one process."""
        return born_on(torch.device("cpu"), empty=empty)

    def describe(self, wrapped: nn.Module, world: World) -> Mapping[str, str]:
        """The devices, how they are laid out, and what is cut over them."""
        layout = _xla(world).layout
        again = {"recomputed": f"{len(self._blocks(wrapped))} blocks"} if self.activation_checkpointing else {}
        devices = f"{_xla(world).num_devices} of {xla_runtime.hardware()} of torch_xla"
        if layout is None:
            return {"devices": devices, **again}
        return {"devices": f"{devices}, one program", **layout.describe(wrapped), **again}

    def _blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        if self.transformer_layer_cls:
            return blocks.by_class(model, self.transformer_layer_cls)
        return blocks.by_size(model, self.min_num_params) if self.min_num_params else blocks.automatic(model)

    def _allow_reads(self, allowed: bool) -> None:
        if self.full_graph:
            xla_runtime.allow_reads(allowed)

    def _refuse_unused_choice(self) -> None:
        names, size = self.transformer_layer_cls, self.min_num_params
        if size < 0 or (names and size) or ((names or size) and not self.activation_checkpointing):
            raise ConfigurationError(
                f"transformer_layer_cls is {names}, min_num_params is {size} and activation_checkpointing is "
                f"{self.activation_checkpointing}; expected at most one of the first two, and only with "
                "activation_checkpointing=True: they choose the blocks that it computes again"
            )

    def _refuse_uncut(self, model: nn.Module, layout: Layout) -> None:
        parameters = dict(model.named_parameters())
        if layout.parts == 1 or not parameters or any(layout.is_cut(p) for p in parameters.values()):
            return
        largest = max(p.numel() for p in parameters.values())
        raise PrepareError(
            f"{type(model).__name__} is too small to be cut over {layout.parts} devices: its largest parameter has "
            f"{largest} elements; expected one of at least {self.min_sharded_elements}, with a dimension of at least "
            f"{layout.parts}. Use shard='data', or a smaller min_sharded_elements."
        )


def _xla(world: World) -> XLAWorld:
    assert isinstance(world, XLAWorld)  # made by setup
    return world
