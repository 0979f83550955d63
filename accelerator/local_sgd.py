"""Ranks that train alone for some steps and then average their weights: local SGD, and post-local SGD."""

from __future__ import annotations

import zlib
from collections import Counter
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from strategies import collectives
from strategies.batch_norm import broadcast_buffers
from strategies.errors import ConfigurationError, StepError
from strategies.observer import Observer
from strategies.process_group import named_failures

from .ema import EMA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from strategies.prepared.optimizer import OptimizerLink
    from strategies.window import Window

    from .accelerator import Accelerator


class LocalSGD(Observer):
    """A block in which ranks average their weights every `local_sgd_steps` optimizer steps, and never their gradients.

    In between each rank trains alone: the gradient of a step is that of the mean loss over its own samples of the
    window, or over its own units of `weight=`; of a window without any it is zero. With `warmup_steps`, the first steps
    of the block are those of all ranks together (post-local SGD). Stich 2019, arXiv:1805.09767; Lin et al. 2020,
    arXiv:1808.07217. At the end of the block weights, and then also the moments of the optimizers, are averaged, so
    that training goes on together. The averaging is that of `torch.distributed.algorithms.model_averaging`.

    Every rank enters it, around the loop; it hears of the steps by itself. On one process, and with `enabled=False`, it
    does nothing. Inside, weights are this rank's own: calls that save or load them raise `StateError`, and an
    evaluation belongs after the block.

    Raises `ConfigurationError` for a strategy that cannot train ranks apart, for float16, and beside other models that
    are trained or an `EMA`; `StepError` if it is entered or left inside an open window, and for training that goes on
    after an exception left the block.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        local_sgd_steps: int,
        enabled: bool = True,
        *,
        warmup_steps: int = 0,
    ) -> None:
        if local_sgd_steps < 1 or warmup_steps < 0:
            raise ConfigurationError(
                f"local_sgd_steps is {local_sgd_steps} and warmup_steps is {warmup_steps}; expected at least 1 and 0"
            )
        self._accumulation = accelerator._accumulation
        self._link = self._accumulation.link(model)
        self._every, self._warmup = local_sgd_steps, warmup_steps
        self._enabled = enabled
        self._taken: Counter[OptimizerLink] = Counter()
        self._alone: AbstractContextManager[Any] | None = None
        self._left_by: str | None = None

    def __enter__(self) -> LocalSGD:
        if self._enabled:
            context = self._refuse_or_get()
            self._taken.clear()
            if self._accumulation.world.size > 1:
                self._accumulation.observers.append(self)
                if self._warmup == 0:
                    self._go_alone(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self not in self._accumulation.observers:
            return
        if error is not None and self._alone is not None:  # other ranks may be anywhere
            self._left_by = type(error).__name__
            return
        try:
            if error is None:
                self._refuse_open("left")
            if self._alone is not None:
                self._come_together(self._alone)
        except Exception as failure:
            self._left_by = type(failure).__name__ if self._alone is not None else None
            raise
        finally:
            if self._alone is None:
                self._accumulation.observers.remove(self)

    # -- what the loop tells -------------------------------------------------------------------------------

    def batch_wanted(self, loader: DataLoader[object]) -> None:
        """Between windows."""
        self._end_warmup()

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """Refuse to go on with ranks that have parted."""
        if self._left_by is not None:
            raise StepError(
                f"LocalSGD was left by {self._left_by}, when ranks had weights of their own and could not average "
                "them. Build another Accelerator, and load a checkpoint."
            )

    def update_begun(self, optimizer: OptimizerLink) -> None:
        """Refuse to train what would never be averaged."""
        if self._alone is not None and self._link not in optimizer.models:
            raise StepError(
                f"{type(optimizer.original).__name__} of another model than {self._link.name} steps inside LocalSGD, "
                "where samples are weighed by rank and nothing would average it. Train that model outside of the block."
            )

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """Count a step; average after every so many."""
        if self._link not in optimizer.models:
            return
        self._taken[optimizer] += 1
        alone = self._taken[optimizer] - self._warmup
        if alone > 0 and self._alone is None:
            raise StepError(
                "LocalSGD could not tell where a window ends, after which its warmup_steps are over. Put forward, "
                "backward and step inside `with accelerator.accumulate(model):`."
            )
        if alone > 0 and alone % self._every == 0:
            self._average(optimizer)

    def micro_batch_ended(self, window: Window) -> None:
        """Perhaps between windows."""
        self._end_warmup()

    # -- how -----------------------------------------------------------------------------------------------

    def _refuse_or_get(self) -> AbstractContextManager[Any]:
        """What keeps ranks apart. Raises for what cannot be trained so."""
        accumulation, link = self._accumulation, self._link
        context = accumulation.strategy.train_alone(link.wrapped)
        if accumulation.precision.scales_loss:
            raise ConfigurationError(
                "LocalSGD got mixed_precision='fp16', whose loss scale and skipped steps all ranks share. Use 'bf16'."
            )
        others = [model.name for model in accumulation.models if model is not link and model.is_trained]
        if others:
            raise ConfigurationError(
                f"LocalSGD got {link.name}, and {', '.join(others)} is trained beside it. Give it the only model."
            )
        if any(isinstance(observer, EMA) for observer in accumulation.observers):
            raise ConfigurationError(
                "LocalSGD and EMA were asked for together, but weights of single ranks have no average that all agree "
                "on. Leave one of them out."
            )
        if accumulation.trains_alone:
            raise StepError("LocalSGD was entered inside another")
        self._refuse_open("entered")
        return context

    def _refuse_open(self, what: str) -> None:
        if self._accumulation.current is not None or self._accumulation.open_windows():
            raise StepError(
                f"LocalSGD was {what} inside an open accumulation window. It goes around the loop, or between windows "
                "(where accelerator.sync_gradients is true)."
            )

    def _go_alone(self, context: AbstractContextManager[Any]) -> None:
        self._accumulation.train_alone(True)
        context.__enter__()
        self._alone = context

    def _come_together(self, context: AbstractContextManager[Any]) -> None:
        """Average weights and moments, so that steps of all ranks go on from the same. Collective."""
        for optimizer in self._link.optimizers:
            self._average(optimizer)
            self._average_state(optimizer)
        context.__exit__(None, None, None)
        self._alone = None
        self._accumulation.train_alone(False)

    def _end_warmup(self) -> None:
        over = self._alone is None and self._warmup <= max(self._taken.values(), default=0)
        if over and self._accumulation.current is None and not self._accumulation.open_windows():
            self._go_alone(self._refuse_or_get())

    def _average(self, optimizer: OptimizerLink) -> None:
        """Give every rank the mean of all ranks' weights, and rank 0's buffers if buffers are to agree. Collective."""
        taken = collectives.meet("the mean of LocalSGD", self._accumulation.world, self._taken[optimizer])
        if len(set(taken)) > 1:
            raise StepError(
                f"LocalSGD cannot average weights after other numbers of steps on other ranks (by rank: {taken}). Does "
                "one of them leave a batch out? It can give backward() a loss with weight=0 instead."
            )
        self._mean([parameter for parameter in optimizer.parameters() if parameter.requires_grad])
        if self._accumulation.strategy.buffers_agree:
            broadcast_buffers(self._link.original)

    def _average_state(self, optimizer: OptimizerLink) -> None:
        """Give every rank the mean of all ranks' moments. Counts of steps are alike. Collective."""
        held = optimizer.original.state
        state = [
            value
            for parameter in optimizer.parameters()
            for name, value in sorted(held.get(parameter, {}).items())
            if isinstance(value, Tensor) and value.is_floating_point() and name != "step"
        ]
        shapes = zlib.crc32(repr([tuple(value.shape) for value in state]).encode())
        if len(set(collectives.meet("the end of LocalSGD", self._accumulation.world, shapes))) > 1:
            raise StepError(
                f"{type(optimizer.original).__name__} has state for other parameters on one rank than on another: some "
                "had no part in the loss there. Use every parameter on every rank."
            )
        self._mean(state)

    def _mean(self, tensors: Sequence[Tensor]) -> None:
        from torch.distributed.algorithms.model_averaging.utils import average_parameters

        if tensors:
            means: list[Any] = [tensor.detach() for tensor in tensors]  # whose `.data` it replaces
            with torch.no_grad(), named_failures(self._accumulation.world):
                average_parameters(iter(means), dist.group.WORLD)  # type: ignore[arg-type]  # there is one
                torch._foreach_copy_(list(tensors), means)
