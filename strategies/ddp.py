"""One process per device, each with a whole copy of the model, gradients averaged in backward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import gradient_compression
from .base import NOTHING, Exchange, Strategy
from .batch_norm import BatchNorm, broadcast_buffers, with_batch_norm
from .errors import ConfigurationError, StepError, listed
from .field_types import check_types
from .precision import Precision
from .process_group import join, leave
from .transfer import to_device
from .world import World

# torch 2.13 renamed the argument; before, broadcast_buffers=False also left buffers as they were at the start.
_NO_BUFFER_SYNC_IN_FORWARD: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


@dataclass(frozen=True)
class DDP(Strategy):
    """torch's `DistributedDataParallel`; fields without a note below are its arguments, with its defaults.

    `device`: `"auto"`, `"cpu"`, `"cuda"`, ...; a process takes the device of its local rank.
    `backend`: of the process group; `None` is the device's own (gloo on a CPU, nccl on CUDA).
    `timeout_seconds`: how long a collective may wait for a rank that is silent but alive.
    `comm_hook`: what gradients travel as: `"none"` their own dtype, `"fp16"`, `"bf16"`, or `"power_sgd"`
    of rank `power_sgd_rank` from step `power_sgd_start` (Vogels et al. 2019, arXiv:1905.13727).
    `batch_norm`: batch normalisation sees only its rank's samples, which is not what one process computes:
    `"error"` refuses such a model, `"sync"` converts it to `torch.nn.SyncBatchNorm` (not on a CPU),
    `"local"` keeps it as it is.
    `broadcast_buffers`: after each update every rank takes rank 0's buffers; torch does it before each forward.
    """

    device: str = "auto"
    backend: str | None = None
    timeout_seconds: float = 1800.0
    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: float | None = None
    broadcast_buffers: bool = True
    init_sync: bool = True
    comm_hook: Literal["none", "fp16", "bf16", "power_sgd"] = "none"
    power_sgd_rank: int = 1
    power_sgd_start: int = 1000
    batch_norm: BatchNorm = "error"

    def __post_init__(self) -> None:
        check_types(self, DDP)
        if self.timeout_seconds <= 0:
            raise ConfigurationError(f"timeout_seconds is {self.timeout_seconds}; expected a number above 0")
        if self.power_sgd_rank < 1 or self.power_sgd_start < 2:
            raise ConfigurationError(
                f"power_sgd_rank is {self.power_sgd_rank} and power_sgd_start is {self.power_sgd_start}; "
                "expected at least 1 and 2"
            )

    def setup(self) -> World:
        """Join the process group that the launcher describes; a group of one under plain `python`."""
        return join(self.device, self.backend, timedelta(seconds=self.timeout_seconds))

    def teardown(self, world: World) -> None:
        """Destroy the process group."""
        leave()

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        """Move the model to the device, copy rank 0's weights to all, and average gradients in backward."""
        model = with_batch_norm(model, self.batch_norm, world, "DDP").to(world.device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # DistributedDataParallel refuses what has nothing to synchronise
        wrapped = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type != "cpu" else None,
            **_NO_BUFFER_SYNC_IN_FORWARD,  # after each update instead, in reduce_gradients
            init_sync=self.init_sync,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
        )
        if world.size > 2 and not (self.find_unused_parameters or self.static_graph):
            _keep_buckets(wrapped)
        gradient_compression.register(wrapped, self.comm_hook, rank=self.power_sgd_rank, start=self.power_sgd_start)
        if self.init_sync:
            self.reduce_gradients([wrapped], world)
        return wrapped

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The module inside DistributedDataParallel."""
        return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped

    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        """torch's autocast for the device."""
        return torch.autocast(world.device.type, dtype=precision.dtype)

    @property
    def buffers_agree(self) -> bool:
        """Whether buffers are rank 0's after each update."""
        return self.broadcast_buffers

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Keep gradients local: DistributedDataParallel reads the flag in forward.

        With `static_graph` the very first backward must synchronise (torch asserts otherwise), which adds a
        collective and changes no number: means of gradients add up.
        """
        if not isinstance(wrapped, DistributedDataParallel):
            return NOTHING
        if self.static_graph and not wrapped._static_graph_delay_allreduce_enqueued:
            return NOTHING
        return wrapped.no_sync()

    def train_alone(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """`no_sync` of DistributedDataParallel, around all that happens."""
        if self.static_graph:
            raise ConfigurationError(
                "static_graph is True, with which DDP synchronises its first backward; expected False for LocalSGD"
            )
        return self.no_sync(wrapped)

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        """Gradients were averaged in backward; here ranks take rank 0's buffers, such as running means."""
        for model in wrapped:
            if isinstance(model, DistributedDataParallel):
                _refuse_unfinished(model)
            if world.size > 1 and self.broadcast_buffers:
                broadcast_buffers(model)

    def discard_gradients(self, wrapped: nn.Module) -> None:
        """What `no_sync` left is in `.grad`; DistributedDataParallel begins each forward anew."""

    def last_exchange(self, wrapped: nn.Module) -> Exchange | None:
        """What DistributedDataParallel measures of its first ten windows, and then of some.

        Of every hundredth, for which it waits on the device; once asked, of every tenth on a CPU: that takes 0.2 us per
        parameter, and one in a hundred of a run of a thousand windows would say little.
        """
        if not isinstance(wrapped, DistributedDataParallel):
            return None
        if wrapped.device_type == "cpu":
            wrapped._set_ddp_runtime_logging_sample_rate(10)
        found = wrapped._get_ddp_logging_data()
        spent, hidden = (found.get(f"backward_{what}_time", 0) for what in ("comm", "compute_comm_overlap"))
        return Exchange(found["iteration"], spent * 1e-9, hidden * 1e-9) if spent else None

    def set_open_gradients(self, wrapped: nn.Module, gradients: Mapping[str, Tensor], world: World) -> None:
        """Set them, and with `find_unused_parameters` also what DistributedDataParallel knows of an open window.

        It keeps in memory which parameters a window has used, and averages no others when it closes.
        """
        if self.find_unused_parameters and not self.static_graph and isinstance(wrapped, DistributedDataParallel):
            named = wrapped.module.named_parameters()
            _backward_of_zeros(p for name, p in named if name in gradients and p.requires_grad)
        super().set_open_gradients(wrapped, gradients, world)

    def mark_step(self, world: World) -> None:
        """Operations run as they are called."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        """Move each batch to the device."""
        return to_device(batches, world.device)


def _refuse_unfinished(wrapped: DistributedDataParallel) -> None:
    """Raise `StepError` if a parameter had no part in the loss: torch then averages none of its bucket.

    Torch itself says so at the next forward, when the optimizer has stepped with each rank's own gradients.
    """
    try:
        wrapped.reducer._check_reducer_finalized()
    except RuntimeError as error:
        listed_indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if listed_indices is None:
            raise
        trained = [name for name, parameter in wrapped.module.named_parameters() if parameter.requires_grad]
        unused = [trained[int(index)] for index in listed_indices[1].split()]
        raise StepError(
            f"{listed(unused)} of {type(wrapped.module).__name__} had no part in the loss of the micro-batch that "
            "closes the window, so DDP averaged no gradient of its bucket. Set find_unused_parameters=True (in [ddp], "
            "or DDP(find_unused_parameters=True)), freeze what is never used, or use it in the loss."
        ) from error


def _keep_buckets(wrapped: DistributedDataParallel) -> None:
    """Have gradients travel in the same buckets from the first step on, in the reverse order of parameters. Collective.

    torch orders its buckets anew after the first backward, and where an element is in its bucket decides in which order
    three or more ranks are summed: a resumed run would differ from one that never stopped in the last bits of its first
    step. Here a backward of zeros in that order comes first, so that the new buckets are the old ones.
    """
    parameters = [parameter for parameter in wrapped.module.parameters() if parameter.requires_grad]
    if any(getattr(module, "sparse", False) for module in wrapped.module.modules()):
        return  # a bucket of sparse gradients takes no others
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        return  # the user's own hooks expect gradients of a loss
    wrapped.reducer.prepare_for_backward([])
    _backward_of_zeros(reversed(parameters))
    for parameter in parameters:
        parameter.grad = None


def _backward_of_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """Have torch see each of `parameters` take part in a backward."""
    for parameter in parameters:
        parameter.expand_as(parameter).backward(torch.zeros_like(parameter))
