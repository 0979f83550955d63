"""Strategies that break one promise each, as authors do by accident; the rule meant for it must reject each."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from strategies import CPU, DDP, Precision, Strategy, World
from strategies.tree import map_tensors


@dataclass(frozen=True)
class ByHand(DDP):
    """No wrapper: gradients are averaged in `reduce_gradients`. Right, and the base of the wrong ones below."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            average_gradients(model, world.size)


def average_gradients(model: nn.Module, divisor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= divisor


# --- the world ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EachAlone(CPU):
    """Every process believes that it is the only one."""

    def setup(self) -> World:
        return World()


@dataclass(frozen=True)
class AlwaysTheFirst(DDP):
    """The sizes are right, and every process is rank 0."""

    def setup(self) -> World:
        world = super().setup()
        return World(size=world.size, local_size=world.local_size, backend=world.backend)


@dataclass(frozen=True)
class LeavesNothing(DDP):
    """Forgets to leave the process group."""

    def teardown(self, world: World) -> None:
        pass


@dataclass(frozen=True)
class TearsDownTheGroupOfOthers(ByHand):
    """Leaves the process group even where another Accelerator made it."""

    def teardown(self, world: World) -> None:
        dist.destroy_process_group()


@dataclass(frozen=True)
class HangsOnOneRank(DDP):
    """Rank 0 enters a collective that no other rank enters."""

    def setup(self) -> World:
        world = super().setup()
        if world.is_main:
            dist.all_reduce(torch.zeros(1))
        else:
            time.sleep(3600)
        return world


@dataclass(frozen=True)
class DiesOnOneRank(DDP):
    """The last rank ends without a word."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        if world.rank == world.size - 1:
            os._exit(3)
        return super().wrap(model, world, precision)


# --- parameters -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReturnsTheWrapper(DDP):
    """`unwrap` gives back what `wrap` made."""

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        return wrapped


@dataclass(frozen=True)
class TrainsACopy(CPU):
    """`wrap` copies the model, and `unwrap` returns the copy: the user's own model is not the one trained."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        return copy.deepcopy(model)


class Holder(nn.Module):
    """Computes with a copy of the model it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.replaced = copy.deepcopy(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replaced(*args, **kwargs)


@dataclass(frozen=True)
class ReplacesParametersSilently(CPU):
    """Forward uses new parameters, and nobody tells the optimizer: trains nothing and reports no error."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        return Holder(model)

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        assert isinstance(wrapped, Holder)
        return wrapped.model


@dataclass(frozen=True)
class ReplacesParametersLate(CPU):
    """Parameters are replaced at the first forward, when the optimizer has been re-pointed already."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        def replace(module: nn.Module, args: Any) -> None:
            handle.remove()
            for part in model.modules():
                for name, parameter in list(part.named_parameters(recurse=False)):
                    setattr(part, name, nn.Parameter(parameter.detach().clone()))

        handle = model.register_forward_pre_hook(replace)
        return model


@dataclass(frozen=True)
class RestoresMasterWeights(CPU):
    """Every forward brings back master weights that no optimizer ever updated."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        master = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.register_forward_pre_hook(lambda module, args: model.load_state_dict(master) and None)
        return model


@dataclass(frozen=True)
class NeverBroadcasts(ByHand):
    """Every rank starts from its own weights."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        return model


# --- gradients ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepsCopies(ByHand):
    """Keeps a copy of every window's gradients, to look at one day."""

    kept: list[Tensor] = field(default_factory=list)

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        super().reduce_gradients(wrapped, world)
        self.kept.extend(p.grad.clone() for model in wrapped for p in model.parameters() if p.grad is not None)


@dataclass(frozen=True)
class SumsGradients(ByHand):
    """Adds gradients up over ranks, and does not divide."""

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            average_gradients(model, 1)


@dataclass(frozen=True)
class ScalesGradients(CPU):
    """Divides by a number of micro-batches that it was configured with, beside the loop's own weights."""

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            average = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            torch._foreach_div_(average, 3)


@dataclass(frozen=True)
class CountsMicroBatches(CPU):
    """Weights its windows itself, as if each were to have three micro-batches: wrong for a shorter one only."""

    entered: list[nn.Module] = field(default_factory=list)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        self.entered.append(wrapped)
        return nullcontext()

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= (len(self.entered) + 1) / 3
        self.entered.clear()


@dataclass(frozen=True)
class PadsBatches(ByHand):
    """Repeats the last sample of a short batch, so that all batches have one shape."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[-1:].expand(3 - len(tensor), *tensor.shape[1:])])

        for batch in batches:
            yield map_tensors(pad, batch)


@dataclass(frozen=True)
class LeavesOutIdleRanks(ByHand):
    """Averages over the ranks that have a gradient, instead of over all."""

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            busy = torch.tensor(float(any(p.grad.any() for p in model.parameters() if p.grad is not None)))
            dist.all_reduce(busy)
            average_gradients(model, float(busy))


@dataclass(frozen=True)
class NarrowsIntegers(CPU):
    """Sends integers in 8 bits, to save bandwidth: counts of tokens wrap around."""

    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        for batch in batches:
            yield map_tensors(lambda tensor: tensor if tensor.is_floating_point() else tensor.to(torch.uint8), batch)


@dataclass(frozen=True)
class ReducesInTheOptimizer(ByHand):
    """Averages gradients in a hook of the optimizer's step, which is after clipping."""

    handles: list[Any] = field(default_factory=list)

    def setup(self) -> World:
        world = super().setup()

        def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world.size

        self.handles.append(register_optimizer_step_pre_hook(average))
        return world

    def teardown(self, world: World) -> None:
        self.handles.pop().remove()
        super().teardown(world)

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        pass


class Casting(nn.Module):
    """Computes with copies that a forward makes and the backward after it drops."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copies: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.copies = self.copies or {name: tensor.clone() for name, tensor in self.model.named_parameters()}
        output = torch.func.functional_call(self.model, self.copies, args, kwargs)
        if output.requires_grad:
            output.register_hook(lambda gradient: self.copies.clear())
        return output


@dataclass(frozen=True)
class DropsCopiesInBackward(CPU):
    """Copies of the weights outlive the step where a forward had no backward."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        return Casting(model)

    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        assert isinstance(wrapped, Casting)
        return wrapped.model


@dataclass(frozen=True)
class KnowsOneModel(ByHand):
    """Remembers the model that was wrapped last, and reduces that one."""

    remembered: list[nn.Module] = field(default_factory=list)

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        self.remembered.append(model)
        return super().wrap(model, world, precision)

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        average_gradients(self.remembered[-1], world.size)


# --- communication --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeverDefers(DDP):
    """Every micro-batch exchanges gradients. The numbers are right."""

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()


@dataclass(frozen=True)
class NeverSyncsAgain(DDP):
    """The first open window switches synchronisation off for good."""

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        assert isinstance(wrapped, DistributedDataParallel)
        wrapped.require_backward_grad_sync = False
        return nullcontext()


@dataclass(frozen=True)
class AveragesTwice(DDP):
    """Averages in backward and again in `reduce_gradients`. The numbers are right."""

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            average_gradients(model, world.size)


# --- precision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeverAutocasts(CPU):
    """Asked for bfloat16, it computes in float32."""

    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        return nullcontext()


@dataclass(frozen=True)
class CastsTheModel(CPU):
    """Asked for bfloat16, it keeps the weights in it."""

    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        return model.to(precision.dtype) if precision.dtype is not None else model


@dataclass(frozen=True)
class HidesOverflow(ByHand):
    """Cleans infinities out of gradients before anyone can see them."""

    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        for model in wrapped:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        super().reduce_gradients(wrapped, world)


@dataclass(frozen=True)
class ForgetsMarkStep(Strategy):
    """Nine of the ten methods."""

    setup, teardown, wrap, unwrap = CPU.setup, CPU.teardown, CPU.wrap, CPU.unwrap
    autocast, no_sync, reduce_gradients = CPU.autocast, CPU.no_sync, CPU.reduce_gradients
    device_loader, discard_gradients = CPU.device_loader, CPU.discard_gradients
