"""The training loop of the kit: what a script's five lines do, from the pieces of `strategies` alone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from .. import clipping, shards
from ..accumulation import Accumulation
from ..base import Strategy
from ..precision import MixedPrecision, Precision
from ..prepared import prepare
from ..window import Window
from ..world import World
from .oracle import LEARNING_RATE, Net, Samples, Weights, mean_loss


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: all weights before and after it, and the gradient norm if it was clipped."""

    before: Weights
    after: Weights
    norm: float | None

    @property
    def gradient(self) -> Weights:
        """The gradient that plain SGD must have used."""
        return {name: (self.before[name] - self.after[name]) / LEARNING_RATE for name in self.before}


class Loop:
    """A strategy between `setup` and `teardown`, and the loop that trains under it. A context manager."""

    def __init__(self, strategy: Strategy, *, precision: MixedPrecision = "no", steps: int = 1) -> None:
        self.strategy = strategy
        self.steps = steps
        self._precision = Precision(precision)

    def __enter__(self) -> Loop:
        self.world: World = self.strategy.setup()
        self.accumulation = Accumulation(self.strategy, self.world, self._precision, lambda cursor: self.steps)
        try:
            self._precision.check(self.world.device)
        except BaseException:
            self.strategy.teardown(self.world)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.accumulation.release()
        gc.collect()
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.strategy.teardown(self.world)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where the device has it, so that any wrong factor shows; float32 elsewhere and under autocast."""
        if self._precision.dtype is not None or self.world.device.type == "mps":
            return torch.float32
        return torch.float64

    @property
    def tolerance(self) -> float:
        """How far a gradient may be from the oracle's, relative to its norm: reduction order, or 8 bits of bfloat16."""
        if self._precision.dtype is not None:
            return 5e-2
        return 1e-9 if self.dtype == torch.float64 else 1e-4

    @property
    def closes_window(self) -> bool:
        """Whether the micro-batch that is open, or was last, closes its window."""
        assert self.accumulation.latest is not None
        return self.accumulation.latest.closing

    def prepare(self, *objects: Any) -> list[Any]:
        """The prepared counterparts, in the order given."""
        return prepare(objects, self.accumulation, seed=0)

    def model_and_optimizer(self, seed: int = 0) -> tuple[nn.Module, Optimizer]:
        """A prepared network and plain SGD for it, built before it was prepared, as in a user's script."""
        net = Net(seed).to(self.dtype)
        model, optimizer = self.prepare(net, SGD(net.parameters(), lr=LEARNING_RATE))
        return model, optimizer

    def loader(self, length: int, batch_size: int = 2) -> tuple[Samples, DataLoader[Any]]:
        """Samples and a prepared loader over them, in their order, `batch_size` for each rank at a time."""
        samples = Samples(length, self.dtype)
        (loader,) = self.prepare(DataLoader(samples, batch_size=batch_size))
        return samples, loader

    def accumulate(self, *models: nn.Module) -> Window:
        """The next micro-batch of these models' window; of all models without any."""
        return self.accumulation.window(models).on(None)

    def backward(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Backward of a mean loss, weighted in its window."""
        window = self.accumulation.current or self.accumulation.window_alone()
        window.backward(loss, weight, {})

    def finish_gradients(self, model: nn.Module) -> bool:
        """Have the gradients of `model` reduced, as before clipping. False while its window is open."""
        return self.accumulation.finish(model.parameters()) is not None

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> float | None:
        """Clip, and return the norm before; `None` inside an open window."""
        parameters = self.accumulation.finish(model.parameters())
        if parameters is None:
            return None
        return float(whole(clipping.clip_grad_norm(parameters, max_norm)))

    def train(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Iterable[Any],
        *,
        by_tokens: bool = False,
        max_norm: float | None = None,
    ) -> Iterator[Step]:
        """Train on `batches`, and tell of every optimizer step after it."""
        before = weights_of(model)
        for batch in batches:
            with self.accumulate(model):
                loss = mean_loss(model(x=batch["x"]), batch, by_tokens=by_tokens)
                self.backward(loss, weight=batch["tokens"].sum() if by_tokens else None)
                norm = self.clip_grad_norm(model, max_norm) if max_norm is not None else None
                optimizer.step()
                optimizer.zero_grad()
            if self.closes_window:
                after = weights_of(model)
                yield Step(before, after, norm)
                before = after


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over ranks, on the CPU. Collective if it is."""
    return shards.whole(tensor).cpu()


def weights_of(model: nn.Module) -> Weights:
    """A copy of every parameter of `model`, whole, in float64 on the CPU. Collective for sharded ones."""
    return {name: whole(parameter).double().clone() for name, parameter in model.named_parameters()}
