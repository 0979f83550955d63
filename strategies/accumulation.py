"""Windows of micro-batches: where each begins and closes, and what every micro-batch weighs in it.

At every optimizer step the gradient is that of the mean loss over all samples of the window, over all
ranks. A micro-batch of n samples on one rank of W therefore enters backward with the factor n * W / N,
where N is the number of samples of the whole window and W undoes the mean over ranks. N is known from the
plan of the epoch before the window begins, so the usual window needs no communication. Where it is not
known (explicit weights, a stream, a batch skipped or used twice), micro-batches enter with a reference
in place of N, and the gradients are rescaled once by the true sum when the window closes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import collectives
from .base import Strategy
from .errors import StepError
from .precision import Precision
from .process_group import explain_lost_peer, leave_last_words
from .scaling import LossScaler
from .sources import Cursor, Sources
from .world import World

if TYPE_CHECKING:
    from .prepared.dataloader import DataLoaderLink
    from .prepared.model import ModelLink
    from .prepared.optimizer import OptimizerLink


_log = logging.getLogger("accelerator")


class Window:
    """The window of one group of models. Entering it opens a micro-batch; leaving it ends that one."""

    def __init__(self, accumulation: Accumulation, models: Sequence[ModelLink]) -> None:
        self.accumulation = accumulation
        self.models = tuple(models)
        self.optimizers = accumulation.optimizers_of(models)
        self.scaler = LossScaler(accumulation.world) if accumulation.precision.scales_loss else None
        self.closing = True  # the micro-batch that is open, or was last, ends the window
        self.count = 0  # micro-batches of this window that have ended
        self.num_backward = 0  # backward calls in the micro-batch that is open, or was last
        self.stepped: set[OptimizerLink] = set()
        self._frozen: list[Tensor] = []
        self._contexts = ExitStack()
        self._loader: DataLoader[Any] | None = None
        self._unit: float | Tensor = 1.0  # mean weight of a micro-batch, from the last window that had weights
        self._begin(None, 1)

    def on(self, loader: DataLoader[Any] | None) -> Window:
        """This window, its next micro-batch taken from `loader`; from the loop's own loader with `None`."""
        self._loader = loader
        return self

    def __enter__(self) -> Window:
        accumulation = self.accumulation
        if accumulation.current is not None:
            raise StepError(
                "accumulate() was entered inside another accumulate(). Leave the first one before, "
                "or name the models of both in one: accumulate(generator, discriminator)."
            )
        cursor = accumulation.sources.training(self._loader)
        if cursor is not None and not cursor.verified:
            accumulation.sources.verify(cursor)
        if self.closing:
            self._begin(cursor, accumulation.steps_for(cursor))
        elif cursor is not self._cursor or (cursor is not None and cursor.index != self._first_index + self.count):
            self._deferred = (
                True  # not the micro-batch that was planned: a skipped batch, a part of one, another loader
            )
        self.num_backward = 0
        self._cursor = cursor
        if cursor is not None:
            cursor.train()
        self.closing = self.count + 1 >= self._steps or (cursor is not None and cursor.is_last)
        if not self.closing:
            for model in self.models:
                self._contexts.enter_context(accumulation.strategy.no_sync(model.wrapped))
        if len(accumulation.models) > len(self.models):
            self._freeze_others()
        for optimizer in self.optimizers:
            optimizer.window = self
        accumulation.current = accumulation.latest = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        accumulation = self.accumulation
        accumulation.current = None
        if not self.closing:
            self._contexts.close()
        if self._frozen:
            self._thaw_others()
        if error is not None:
            leave_last_words(accumulation.world, error)
            self._abandon()
            return
        self.count += 1
        if self.closing:
            accumulation.strategy.mark_step(accumulation.world)

    def backward(self, loss: Tensor, weight: float | Tensor | None, arguments: dict[str, Any]) -> None:
        """Run backward of `loss`, a mean over the samples of this micro-batch, with its weight in the window."""
        _check_loss(loss)
        factor = self._factor(weight)
        self.num_backward += 1
        try:
            if self.scaler is not None:
                self.scaler.scale(loss * (factor.float() if isinstance(factor, Tensor) else factor)).backward(
                    **arguments
                )
            elif isinstance(factor, Tensor):
                loss.backward(factor.to(loss.dtype).reshape(loss.shape), **arguments)
            elif factor == 1.0:
                loss.backward(**arguments)
            else:
                loss.backward(loss.new_full(loss.shape, factor), **arguments)
        except RuntimeError as error:
            lost = explain_lost_peer(self.accumulation.world, error)
            if lost is None:
                raise
            raise lost from error

    def finish(self, optimizer: OptimizerLink) -> None:
        """Make the optimizer's gradients those of the window's mean loss: reduce, rescale, unscale. Once a window."""
        if optimizer in self._finished:
            return
        self._finished.add(optimizer)
        if len(self._finished) == 1:
            self._reduce()
        if self._correction is not None:
            gradients = optimizer.gradients()
            if gradients:
                torch._foreach_mul_(gradients, self._correction)
        if self.scaler is not None and optimizer.gradients():
            self.scaler.unscale(optimizer.original)

    def may_zero(self, stepped: bool) -> bool:
        """Whether gradients may be zeroed now: at the start of a window, after its step, or to discard it all."""
        if self.accumulation.current is not self:
            return self.closing
        if self.count == 0 and self.num_backward == 0:
            return True
        return self.closing and (stepped or self.num_backward > 0)

    def begin_alone(self) -> None:
        """Begin a window of one micro-batch for a backward outside `accumulate`, if the last one was used."""
        accumulation = self.accumulation
        cursor = accumulation.sources.training()
        if cursor is not None and not cursor.verified:
            accumulation.sources.verify(cursor)
        if self.stepped or self.num_backward == 0:
            self._begin(cursor, 1)
            self.num_backward = 0
        if cursor is not None:
            cursor.train()
        self._cursor = cursor
        self._first_index = cursor.index if cursor is not None else -1
        self._reference = float(self._samples_of(cursor)) if cursor is not None else float(self._world_size)
        for optimizer in self.optimizers:
            optimizer.window = self
        accumulation.latest = self

    def _abandon(self) -> None:
        """Drop the window in which an exception arose: what its gradients hold by now is nobody's mean."""
        if self.count > 0:
            _log.warning(
                "an exception inside accumulate() dropped the gradients of %d earlier micro-batches of its window",
                self.count,
            )
        for optimizer in self.optimizers:
            optimizer.original.zero_grad()
        self.closing = True
        self.count = self.num_backward = 0

    def _begin(self, cursor: Cursor | None, steps: int) -> None:
        if self.scaler is not None:
            self.scaler.begin_window()
        self._world_size = self.accumulation.world.size
        self._steps = steps
        self._cursor = cursor
        self._first_index = cursor.index if cursor is not None else -1
        self._finished: set[OptimizerLink] = set()
        self._correction: float | Tensor | None = None
        self._explicit: bool | None = None
        self._weight_sum: float | Tensor = 0.0
        self._last_weight: float | Tensor = 0.0
        self.stepped.clear()
        self.count = 0
        if cursor is None:  # no prepared loader: every micro-batch weighs the same
            self._deferred = False
            self._reference = float(steps * self._world_size)
        elif cursor.cut is None:  # a stream: neither sizes nor end are known
            self._deferred = steps > 1
            self._reference = float(steps * max(1, cursor.samples))
        else:
            self._deferred = False
            self._reference = float(cursor.cut.window_samples(cursor.index, steps))

    def _samples_of(self, cursor: Cursor) -> int:
        return cursor.cut.samples(cursor.index) if cursor.cut is not None else max(1, cursor.samples)

    def _factor(self, weight: float | Tensor | None) -> float | Tensor:
        """What `loss` is multiplied by; notes the weight of this micro-batch."""
        cursor = self._cursor
        explicit = weight is not None
        if self._explicit is not None and self._explicit != explicit:
            raise StepError(
                "backward() got weight= in some micro-batches of one window and not in others. Give it in all or none."
            )
        if explicit:
            weight = _check_weight(weight)
            if self._explicit is None:
                self._deferred = self._steps * self._world_size > 1
                self._reference = self._unit * (self._steps * self._world_size)
            if cursor is not None and cursor.is_ghost:
                weight = 0.0
            if self.num_backward and isinstance(weight, float) and weight != self._last_weight:
                raise StepError(
                    f"backward() got weight={weight} after weight={self._last_weight} in the same micro-batch. The losses "
                    "of one micro-batch share its weight: add them up, or put each in an accumulate() of its own."
                )
            if not self._deferred:
                weight = self._reference  # alone in its window: a mean over itself
        else:
            weight = float(cursor.samples) if cursor is not None else 1.0
        self._explicit = explicit
        if self.num_backward == 0:
            self._weight_sum = self._weight_sum + weight
        self._last_weight = weight
        return weight * self._world_size / self._reference

    def _reduce(self) -> None:
        accumulation = self.accumulation
        accumulation.strategy.reduce_gradients([model.wrapped for model in self.models], accumulation.world)
        if not self._deferred:
            return
        if self._world_size == 1 and not isinstance(self._weight_sum, Tensor):
            if self._weight_sum > 0:
                self._correction = float(self._reference) / self._weight_sum
                if self._explicit:
                    self._unit = self._weight_sum / self._steps
            else:
                self._correction = 0.0
            return
        total = collectives.sum_scalar(self._weight_sum, accumulation.world)
        # Nothing weighed anything (every token masked, say): the gradient of no sample is zero.
        self._correction = torch.where(
            total > 0, self._reference / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0
        ).float()
        if self._explicit:
            mean = total / (self._steps * self._world_size)
            self._unit = torch.where(total > 0, mean, torch.as_tensor(self._unit, dtype=mean.dtype, device=mean.device))

    def _freeze_others(self) -> None:
        """Keep this window's backward out of the gradients of models that have a window of their own.

        In a GAN the generator's loss runs through the discriminator. On one device its gradients there are
        wiped by zero_grad(); inside an open window nothing may be wiped, so they must not arise.
        """
        own = {id(parameter) for model in self.models for parameter in model.original.parameters()}
        for model in self.accumulation.models:
            if model not in self.models and model.is_trained:
                model.bypass = True
                self._frozen += [p for p in model.original.parameters() if p.requires_grad and id(p) not in own]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _thaw_others(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for model in self.accumulation.models:
            model.bypass = False


class Accumulation:
    """All windows of one Accelerator, and the objects it prepared. No other Accelerator knows of them."""

    def __init__(
        self,
        strategy: Strategy,
        world: World,
        precision: Precision,
        steps_for: Callable[[Cursor | None], int],
    ) -> None:
        self.strategy = strategy
        self.world = world
        self.precision = precision
        self.steps_for = steps_for
        self.sources = Sources(world)
        self.models: list[ModelLink] = []
        self.optimizers: list[OptimizerLink] = []
        self.loaders: list[DataLoaderLink] = []
        self.given: list[Any] = []  # the user's own objects that were prepared
        self.current: Window | None = None  # the window whose micro-batch is open
        self.latest: Window | None = None
        self.step_was_skipped = False
        self._windows: dict[tuple[ModelLink, ...], Window] = {}

    def window(self, models: Sequence[ModelLink] = ()) -> Window:
        """The window of these models; of all prepared models without any."""
        key = tuple(models) or tuple(self.models)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = self._make_window(key)
        return window

    def forget_windows(self) -> None:
        """Group models anew, because more were prepared. Raises `StepError` inside an open window."""
        open_windows = [window for window in self._windows.values() if not window.closing]
        if open_windows or self.current is not None:
            raise StepError("prepare() was called inside an open accumulation window. Prepare before the loop.")
        self._windows.clear()

    def finish(self, parameters: Sequence[Tensor]) -> bool:
        """Make the gradients of `parameters` ready to be clipped. False while their window is open.

        Raises `StepError` if no prepared optimizer holds any of them.
        """
        owners = {id(p): optimizer for optimizer in self.optimizers for p in optimizer.parameters()}
        found = list(dict.fromkeys(owners[id(p)] for p in parameters if id(p) in owners))
        if not found:
            raise StepError(
                f"clipping got {len(parameters)} parameters, none of which a prepared optimizer holds. "
                "Give parameters of a model that prepare() returned: model.parameters()."
            )
        if any(owner.window is None or not owner.window.closing for owner in found):
            return False
        for owner in found:
            assert owner.window is not None
            owner.window.finish(owner)
        return True

    def release(self) -> None:
        """Let go of everything prepared, so that it can be freed before the process group is left."""
        for model in self.models:
            model.release()
        self._windows.clear()
        for held in (self.models, self.optimizers, self.loaders, self.given):
            held.clear()
        self.current = self.latest = None
        self.sources = Sources(self.world)

    def optimizers_of(self, models: Sequence[ModelLink]) -> list[OptimizerLink]:
        """The optimizers that hold parameters of any of `models`."""
        return [optimizer for optimizer in self.optimizers if any(model in optimizer.models for model in models)]

    def backward(self, loss: Tensor, weight: float | Tensor | None, arguments: dict[str, Any]) -> None:
        """Backward in the micro-batch that is open, or in a window of its own outside `accumulate`."""
        window = self.current
        if window is None:
            if self.steps_for(self.sources.training()) > 1:
                raise StepError(
                    "backward() ran outside accumulate() although gradients are to be accumulated over several "
                    "micro-batches. Put forward, backward and step inside `with accelerator.accumulate(model):`."
                )
            if self.precision.scales_loss and len(self.optimizers) > 1:
                raise StepError(
                    f"backward() ran outside accumulate() with float16 and {len(self.optimizers)} optimizers, whose loss "
                    "scales must not mix. Put each loss inside `with accelerator.accumulate(its_model):`."
                )
            window = self.window()
            window.begin_alone()
        window.backward(loss, weight, arguments)

    def _make_window(self, models: tuple[ModelLink, ...]) -> Window:
        for optimizer in self.optimizers_of(models):
            missing = [model for model in optimizer.models if model not in models]
            if missing:
                named = ", ".join(type(model.original).__name__ for model in missing)
                raise StepError(
                    f"{type(optimizer.original).__name__} also holds parameters of {named}, which accumulate() does not "
                    "name. Name every model that one optimizer trains: accumulate(encoder, decoder)."
                )
        return Window(self, models)


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise StepError(f"loss is {type(loss).__name__}; expected a scalar tensor with a gradient")
    if loss.numel() != 1:
        raise StepError(
            f"loss has shape {tuple(loss.shape)}; expected a scalar: the mean over the samples of this micro-batch"
        )
    if not loss.requires_grad:
        raise StepError(
            "loss carries no gradient. Was it detached, computed under torch.no_grad(), or by a model without "
            "trainable parameters?"
        )


def _check_weight(weight: float | Tensor) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise StepError(f"weight has shape {tuple(weight.shape)}; expected one number, such as the count of tokens")
        return (
            weight.detach().reshape(()).double() if weight.device.type != "mps" else weight.detach().reshape(()).float()
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise StepError(f"weight is {weight!r}; expected a finite number >= 0, such as the count of tokens")
    return float(weight)
