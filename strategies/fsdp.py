"""Parameters, gradients and optimizer state cut over ranks, gathered one block at a time: torch's `fully_shard`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from . import blocks, deferred_init
from .base import Strategy
from .batch_norm import BatchNorm, broadcast_buffers, with_batch_norm
from .blocks import Block
from .errors import ConfigurationError, PrepareError
from .field_types import check_types
from .precision import Precision
from .process_group import join, leave
from .sharded_model import (
    average,
    discard,
    held_gradients,
    hold_gradients,
    reduce_unused,
    refuse_sharded,
    refuse_uneven_use,
    return_no_views,
    set_averaged,
    settle,
    take_from_rank_0,
)
from .shards import copy_whole
from .transfer import to_device
from .world import World

ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"]
Dtype = Literal["float32", "bfloat16", "float16"]
_POLICIES = {"TRANSFORMER_BASED_WRAP": "transformer", "SIZE_BASED_WRAP": "size", "NO_WRAP": "none"}


@dataclass(frozen=True)
class FSDP(Strategy):
    """torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277), on a CPU as on accelerators.

    `device`, `backend`, `timeout_seconds`, `batch_norm`, `broadcast_buffers`: as for `DDP`.
    `reshard_after_forward`: whether a block releases what it gathered after its forward; an integer keeps a part,
    over that many ranks; `None` is torch's default, yes for blocks and no for the rest of the model.
    `replicate` and `shard`: the mesh. Ranks hold `replicate` copies of the model, each cut over `shard` ranks
    (HSDP); what is `None` follows from the other, and without either there is one copy.
    `sharding_strategy`: the same in the words of FSDP1.
    `auto_wrap_policy`: what is gathered as one: `"auto"` (the blocks that a model of transformers declares, else
    the repeated ones), `"transformer"` (the classes `transformer_layer_cls`), `"size"` (modules of at least
    `min_num_params` elements), `"none"` (the whole model), or a function of name and module. Giving
    `transformer_layer_cls` or `min_num_params` chooses its policy.
    `reduce_dtype`: what gradients are averaged in; `None` is float32 under mixed precision, else their own.
    `reduce_every_micro_batch`: inside an open window, average at every micro-batch and keep only this rank's part
    of the gradients, instead of whole ones without communication: less memory, more traffic, the same numbers.
    `cpu_offload`: parameters, gradients and optimizer state rest in CPU memory, pinned with `pin_memory`
    (`None`: where there is an accelerator).
    `ignored_params`: names, with wildcards, of parameters that stay whole on every rank.
    `activation_checkpointing`: whether blocks are computed again in backward (Chen et al. 2016, arXiv:1604.06174).
    `forward_prefetch`, `backward_prefetch`: how many blocks ahead are gathered; 0 is none.
    `compile`: `torch.compile` of each block, with `compile_backend`.
    `find_unused_parameters`: whether ranks may use different parameters of a block that all of them call; what a rank
    does not use has a zero gradient there, and nowhere no gradient (torch 2.13).
    `forward_methods`: methods of the model, besides `forward` and `generate`, that use its parameters directly.
    """

    device: str = "auto"
    backend: str | None = None
    timeout_seconds: float = 1800.0
    sharding_strategy: ShardingStrategy | None = None
    reshard_after_forward: bool | int | None = None
    replicate: int | None = None
    shard: int | None = None
    auto_wrap_policy: str | Callable[[str, nn.Module], bool] = "auto"
    transformer_layer_cls: tuple[str, ...] = ()
    min_num_params: int = 0
    reduce_dtype: Dtype | None = None
    reduce_every_micro_batch: bool = False
    cpu_offload: bool = False
    pin_memory: bool | None = None
    ignored_params: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    forward_prefetch: int = 0
    backward_prefetch: int = 1
    compile: bool = False
    compile_backend: str = "inductor"
    find_unused_parameters: bool = False
    forward_methods: tuple[str, ...] = ()
    broadcast_buffers: bool = True
    batch_norm: BatchNorm = "error"

    def __post_init__(self) -> None:
        check_types(self, FSDP)
        policies = [*_POLICIES.values(), "auto", *_POLICIES]
        if isinstance(self.auto_wrap_policy, str) and self.auto_wrap_policy not in policies:
            raise ConfigurationError(
                f"auto_wrap_policy is {self.auto_wrap_policy!r}; expected one of {', '.join(map(repr, policies))}"
            )
        for name, least in (("replicate", 1), ("shard", 1), ("min_num_params", 0), ("timeout_seconds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name} is {value}; expected at least {least}")
        if self.forward_prefetch < 0 or self.backward_prefetch < 0:
            raise ConfigurationError(
                f"forward_prefetch is {self.forward_prefetch} and backward_prefetch is {self.backward_prefetch}; "
                "expected a number of blocks >= 0"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        policy, words = self._policy, self.sharding_strategy
        if policy == "transformer" and not self.transformer_layer_cls:
            raise ConfigurationError("auto_wrap_policy is 'transformer'; name the classes in transformer_layer_cls")
        if policy == "size" and not self.min_num_params:
            raise ConfigurationError("auto_wrap_policy is 'size'; give the least number of elements in min_num_params")
        if (self.transformer_layer_cls and policy != "transformer") or (self.min_num_params and policy != "size"):
            raise ConfigurationError(
                f"auto_wrap_policy is {self.auto_wrap_policy!r}, transformer_layer_cls is {self.transformer_layer_cls} "
                f"and min_num_params is {self.min_num_params}; expected one way to choose blocks"
            )
        if words is not None and self.reshard_after_forward is not None:
            raise ConfigurationError(
                f"sharding_strategy is {words!r} and reshard_after_forward is {self.reshard_after_forward}; expected "
                "one of the two, since each gives the other"
            )
        if words is not None and not words.startswith("HYBRID") and (self.replicate or self.shard):
            raise ConfigurationError(
                f"sharding_strategy is {words!r} and replicate={self.replicate}, shard={self.shard}; expected a mesh "
                "only with HYBRID_SHARD and HYBRID_SHARD_ZERO2"
            )
        if self.pin_memory is not None and not self.cpu_offload:
            raise ConfigurationError(
                f"pin_memory is {self.pin_memory} but cpu_offload is False; expected it to be True"
            )

    # -- the contract --------------------------------------------------------------------------------------

    def setup(self) -> World:
        """Join the process group that the launcher describes, and lay the ranks out in a mesh."""
        from torch.distributed.device_mesh import init_device_mesh

        world = join(self.device, self.backend, timedelta(seconds=self.timeout_seconds))
        try:
            replicate, shard = self._mesh_shape(world)
            reshard = self.reshard_after_forward
            if type(reshard) is int and not (1 < reshard < shard and shard % reshard == 0):
                raise ConfigurationError(
                    f"reshard_after_forward is {reshard}; expected True, False or a number of ranks between 1 and "
                    f"{shard} that divides {shard}"
                )
            if self.pin_memory and world.device.type == "cpu":
                raise ConfigurationError(
                    "pin_memory is True, but only the CPU is here, where there is no device to copy to. Leave it out."
                )
            kind = world.device.type
            if replicate == 1:
                mesh = init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
            else:
                mesh = init_device_mesh(kind, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        except BaseException:
            leave()
            raise
        return replace(world, mesh=mesh)

    def teardown(self, world: World) -> None:
        """Leave the process group."""
        leave()

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        """Shard `model` in place, block by block, with rank 0's weights.

        A model from `init_module` gets its weights only here, one parameter at a time.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        refuse_sharded(model)
        blocks.refuse_embeddings(model)
        model = with_batch_norm(model, self.batch_norm, world, "FSDP")
        for name in self.forward_methods:
            if not callable(getattr(model, name, None)):
                raise PrepareError(f"forward_methods names {name!r}, but {type(model).__name__} has no such method")
        if self.activation_checkpointing:
            blocks.refuse_caches(model)
        if self.compile:
            blocks.refuse_backend(self.compile_backend)
        ignored = self._ignored(model)
        found = blocks.find_blocks(model, self._chosen(model), set(ignored.values()))
        recording = deferred_init.recording_of(model)
        if recording is not None:
            state = recording.random_state.clone()
            for known in [state, *recording.constants]:  # numbers from elsewhere may differ between ranks
                dist.broadcast(known, src=0)
            with deferred_init.filling(model, recording, state) as fill:
                self._shard(model, found, ignored, world, precision)
                fill(copy_whole)
        else:
            take_from_rank_0(ignored.values(), world.device)
            self._shard(model, found, ignored, world, precision)
        if world.size > 1:
            broadcast_buffers(model)
        for name in {*self.forward_methods, "generate"}:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        inner = sorted((block.module for block in found if block.name), key=[*model.modules()].index)
        settle(model, inner, world, forward=self.forward_prefetch, backward=self.backward_prefetch)
        if self.find_unused_parameters:
            reduce_unused(model)
        return model

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The model itself, which `fully_shard` changed in place."""
        return wrapped

    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        """torch's autocast for the device; the gathered parameters have its dtype already."""
        return torch.autocast(world.device.type, dtype=precision.dtype)

    @property
    def buffers_agree(self) -> bool:
        """Whether buffers are rank 0's after each update."""
        return self.broadcast_buffers

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Keep gradients local and whole: `fully_shard` reads the flag in backward."""
        if self.reduce_every_micro_batch:
            yield
            return
        wrapped.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)  # type: ignore[operator]

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        """Gradients were averaged in backward, but for ignored parameters; buffers become rank 0's."""
        if world.size == 1:
            return
        for model in wrapped:
            for parameter in self._ignored(model).values():
                average(parameter, world)
            refuse_uneven_use(model, world)
            if self.broadcast_buffers:
                broadcast_buffers(model)

    def discard_gradients(self, wrapped: nn.Module) -> None:
        """Forget what an aborted forward or backward left: gathered parameters, gradients of an open window."""
        discard(wrapped)

    def open_gradients(self, wrapped: nn.Module, world: World) -> dict[str, Tensor]:
        """Whole gradients from where `fully_shard` keeps them, or with `reduce_every_micro_batch` cut ones."""
        return super().open_gradients(wrapped, world) | held_gradients(wrapped)

    def set_open_gradients(self, wrapped: nn.Module, gradients: Mapping[str, Tensor], world: World) -> None:
        """Put them back there; with `reduce_every_micro_batch`, averaged and cut."""
        if self.reduce_every_micro_batch:
            set_averaged(wrapped, gradients, world)
        else:
            rest = hold_gradients(wrapped, gradients)
            super().set_open_gradients(wrapped, rest, world)

    def mark_step(self, world: World) -> None:
        """Operations run as they are called."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        """Move each batch to the device."""
        return to_device(batches, world.device)

    def init_context(self, world: World, *, empty: bool) -> AbstractContextManager[Any]:
        """Build on the meta device, and write down how: `wrap` makes each rank's part of the weights."""
        return deferred_init.record(world.device, empty=empty)

    def describe(self, wrapped: nn.Module, world: World) -> Mapping[str, str]:
        """The blocks with their sizes, and the mesh."""
        from torch.distributed.fsdp import FSDPModule

        modules = [(name, module) for name, module in wrapped.named_modules() if name]
        chosen = [pair for pair in modules if isinstance(pair[1], FSDPModule)]
        replicate, shard = self._mesh_shape(world)
        copies = f"{replicate} copies, each" if replicate > 1 else "one copy"
        return {
            "blocks": blocks.describe(blocks.find_blocks(wrapped, chosen, set(self._ignored(wrapped).values())), shard),
            "mesh": f"{copies} cut over {shard} rank{'s' if shard > 1 else ''}",
        }

    # -- how ----------------------------------------------------------------------------------------------

    @property
    def _policy(self) -> str | Callable[[str, nn.Module], bool]:
        policy = self.auto_wrap_policy
        policy = _POLICIES.get(policy, policy) if isinstance(policy, str) else policy
        if policy == "auto" and bool(self.transformer_layer_cls) != bool(self.min_num_params):
            return "transformer" if self.transformer_layer_cls else "size"
        return policy

    def _mesh_shape(self, world: World) -> tuple[int, int]:
        """Copies of the model, and ranks that each is cut over."""
        size, words = world.size, self.sharding_strategy or ""
        replicate, shard = self.replicate, self.shard
        if words == "NO_SHARD":
            return size, 1
        if words.startswith("HYBRID") and replicate is None and shard is None:
            shard = world.local_size  # as in FSDP1: cut within a node, copied over nodes
            if shard == size:
                raise ConfigurationError(
                    f"sharding_strategy is {words!r}, which copies the model over nodes, but all {size} processes are "
                    "on one. Say how many copies: FSDP(replicate=2), or use FULL_SHARD."
                )
        if replicate is None:
            replicate = 1 if shard is None else max(1, size // shard)
        shard = size // replicate if shard is None else shard
        if replicate * shard != size or shard == 0:
            raise ConfigurationError(
                f"replicate is {self.replicate} and shard is {self.shard}, for {size} processes; expected two numbers "
                f"whose product is {size}"
            )
        return replicate, shard

    def _chosen(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        policy = self._policy
        if callable(policy):
            return blocks.by_predicate(model, policy)
        if policy == "transformer":
            return blocks.by_class(model, self.transformer_layer_cls)
        if policy == "size":
            return blocks.by_size(model, self.min_num_params)
        return blocks.automatic(model) if policy == "auto" else []

    def _ignored(self, model: nn.Module) -> dict[str, Parameter]:
        """Parameters that stay whole: those named so, and scalars, which cannot be cut."""
        named = dict(model.named_parameters())
        found = {name: parameter for name, parameter in named.items() if parameter.ndim == 0}
        for pattern in self.ignored_params:
            matching = {name: parameter for name, parameter in named.items() if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                listed = ", ".join(list(named)[:8])
                raise PrepareError(
                    f"ignored_params names {pattern!r}, but {type(model).__name__} has no such parameter; "
                    f"expected names such as {listed}"
                )
            found |= matching
        return found

    def _shard(
        self,
        model: nn.Module,
        found: Sequence[Block],
        ignored: Mapping[str, Parameter],
        world: World,
        precision: Precision,
    ) -> None:
        from torch.distributed._composable import checkpoint
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        offload = OffloadPolicy()
        if self.cpu_offload:
            pin = world.device.type != "cpu" if self.pin_memory is None else self.pin_memory
            offload = CPUOffloadPolicy(pin_memory=pin)
        reduce_dtype = getattr(torch, self.reduce_dtype) if self.reduce_dtype else None
        if reduce_dtype is None and precision.dtype is not None:
            reduce_dtype = torch.float32
        for block in found:
            block.module.register_forward_hook(return_no_views)  # before that of fully_shard
            if block.name and self.activation_checkpointing:
                checkpoint(block.module)
            if block.name and self.compile:
                block.module.compile(backend=self.compile_backend)
            take_from_rank_0([parameter for _, parameter in block.parameters], world.device)
            fully_shard(
                block.module,
                mesh=world.mesh,
                reshard_after_forward=self._reshard_after_forward,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=precision.dtype,
                    reduce_dtype=reduce_dtype,
                    cast_forward_inputs=bool(block.name),  # the model's own inputs stay as the loop gives them
                ),
                offload_policy=offload,
                ignored_params=set(ignored.values()),
            )
        for parameter in ignored.values():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(world.device)

    @property
    def _reshard_after_forward(self) -> bool | int | None:
        return (
            False if self.sharding_strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") else self.reshard_after_forward
        )
