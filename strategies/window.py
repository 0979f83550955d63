"""A window of micro-batches: where it begins and closes, and what may happen while it is open."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .base import NOTHING
from .errors import StepError
from .losses import as_input, is_mean, mean_loss
from .process_group import explain_lost_peer, named_failures
from .scaling import LossScaler
from .shards import local
from .sources import Cursor
from .untouched import Untouched
from .weighting import Weighting

if TYPE_CHECKING:
    from .accumulation import Accumulation
    from .prepared.dataloader import DataLoaderLink
    from .prepared.model import ModelLink
    from .prepared.optimizer import OptimizerLink

_log = logging.getLogger("accelerator")


class Window:
    """The window of one group of models. Entering it opens a micro-batch; leaving it ends that one."""

    def __init__(self, accumulation: Accumulation, models: Sequence[ModelLink], scaler: LossScaler | None) -> None:
        self.accumulation = accumulation
        self.models = tuple(models)
        self.optimizers = accumulation.optimizers_of(models)
        self.scaler = scaler
        self._world = accumulation.step_world
        self._synchronises = self._world.size > 1
        self._has_others = len(accumulation.models) > len(models)
        self.closing = True  # the micro-batch that is open, or was last, ends the window
        self.count = 0  # micro-batches of this window that have ended
        self.num_backward = 0  # backward calls in the micro-batch that is open, or was last
        self.stepped: set[OptimizerLink] = set()
        self._finished: set[OptimizerLink] = set()
        self.weighting = Weighting(self._world, alone=accumulation.trains_alone)
        self._done: set[int] = set()  # gradients that are corrected and unscaled, by identity
        self._correction: float | Tensor | None = None
        self.steps = 1  # micro-batches of a full window
        self._shares_weight = False
        self._cursor: Cursor | None = None
        self._first_index = -1
        self._loader: DataLoader[Any] | None = None
        self._contexts: list[AbstractContextManager[Any]] = []  # not an ExitStack: those cost 2 us a micro-batch
        self._frozen: list[Tensor] = []
        self._untouched = Untouched(self.optimizers)
        self._cannot_go_on: StepError | None = None
        self._restored = False  # whether its first micro-batches were in another process
        self._expected: DataLoaderLink | None = None  # the loader that then gives the next one

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
        cursor = accumulation.sources.take(self._loader)
        if self.closing:
            if self._cannot_go_on is not None:
                raise self._cannot_go_on
            self._begin(cursor, accumulation.steps_for(cursor))
        elif self._restored:
            self._go_on(cursor)
        elif cursor is not self._cursor or (cursor is not None and cursor.index != self._first_index + self.count):
            self._leave_plan_unless_left(cursor)
        self._cursor = cursor
        self.num_backward = 0
        self.closing = self.count + 1 >= self.steps or (cursor is not None and cursor.is_last)
        if not self.closing or self._has_others:
            self._keep_local()
        if accumulation.latest is not self:
            self._become_latest()
        accumulation.current = self
        for observer in accumulation.observers:
            observer.micro_batch_begun(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        accumulation = self.accumulation
        accumulation.current = None
        if self._contexts:
            for context in self._contexts:
                context.__exit__(None, None, None)
            self._contexts = []
        if self._frozen:
            self._thaw_others()
        if error is not None:
            accumulation.sources.fail(error)
            self._abandon()
            for observer in accumulation.observers:
                observer.raised(error)
            return
        self.count += 1
        if self.num_backward == 0:  # left by `continue`, say: this micro-batch is not in the mean
            self.weighting.leave_plan()
            if self.closing and self.weighting.has_any and not self.stepped:
                self.closing = False  # nobody stepped: the next micro-batch closes the window instead
        if self.closing:
            accumulation.strategy.mark_step(accumulation.world)
        for observer in accumulation.observers:
            observer.micro_batch_ended(self)

    @property
    def cursor(self) -> Cursor | None:
        """The pass that the micro-batch that is open, or was last, comes from; `None` for data of the loop's own."""
        return self._cursor

    def begin_alone(self) -> None:
        """Make a window of the batch that the loop holds, for a backward outside `accumulate`.

        Several backwards before one step share it: they are losses of the same batch.
        """
        cursor = self.accumulation.sources.take()
        same_batch = cursor is self._cursor and (cursor is None or cursor.index == self._first_index)
        if self.stepped or self.num_backward == 0 or not same_batch:
            self._begin(cursor, 1)
            self.num_backward = 0
        self._cursor = cursor
        self._become_latest()

    def backward(self, loss: Tensor, weight: float | Tensor | None, arguments: dict[str, Any]) -> None:
        """Run backward of `loss`, with its weight in the window: a mean over this micro-batch, or a loss per sample."""
        cursor = self._cursor
        padded = cursor is not None and cursor.padded_to is not None
        if "gradient" in arguments:
            raise StepError("backward() takes no gradient=, which is what the loss weighs here: multiply the loss")
        if padded or not is_mean(loss):
            models = [model.original for model in self.models]
            loss, weight = mean_loss(loss, weight, cursor, models, frozen=bool(self._frozen))
        if self._synchronises:
            self._check_forward()
        self._untouched.check(is_open=True)
        if cursor is None and self._shares_weight:
            self.accumulation.sources.refuse_kept(weighed=weight is not None)
        factor = self.weighting.factor(cursor, weight, again=self.num_backward > 0)
        if padded and not isinstance(factor, Tensor):
            factor = as_input(torch.tensor([factor], dtype=torch.float64), loss)
        self.num_backward += 1
        for observer in self.accumulation.observers:
            observer.backward_begun(self, loss)
        try:
            self._run_backward(loss, factor, arguments)
        except RuntimeError as error:
            lost = explain_lost_peer(self.accumulation.world, error)
            if lost is None:
                raise
            raise lost from error
        if self.scaler is not None or self.weighting.is_deferred or self.count + 2 == self.steps:
            self._untouched.look()
        for observer in self.accumulation.observers:
            observer.backward_ended(self, loss)

    def _run_backward(self, loss: Tensor, factor: float | Tensor, arguments: dict[str, Any]) -> None:
        if self.scaler is not None:
            factor = factor.float() if isinstance(factor, Tensor) else factor
            self.scaler.scale(loss * factor).backward(**arguments)
        elif isinstance(factor, Tensor):
            loss.backward(factor.to(loss).reshape(loss.shape), **arguments)
        elif factor == 1.0:
            loss.backward(**arguments)
        else:
            loss.backward(loss.new_full(loss.shape, factor), **arguments)

    def state_dict(self) -> dict[str, Any]:
        """What an open window is on this rank, less its gradients: numbers, and the loader that it takes from."""
        link = None if self._cursor is None else self._link(self._cursor)
        return {
            "steps": self.steps,
            "count": self.count,
            "loader": link,
            "global_batch": self._global_batch(link),
            "is_latest": self.accumulation.latest is self,
            "weighting": self.weighting.state_dict(),
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on inside a window with the states that all ranks had; on more or fewer of them, up to as many samples."""
        mine = states[0]
        link = self._expected = mine["loader"]
        self.weighting.load_state_dict([state["weighting"] for state in states], counts_micro_batches=link is None)
        self.closing, self.count, self.steps, self.num_backward = False, mine["count"], mine["steps"], 1
        left = (self.steps - self.count) * mine["global_batch"]
        self.steps = self.count - (-left // self._global_batch(link))
        self._restored = True
        self._become_latest(is_latest=mine["is_latest"])

    def _go_on(self, cursor: Cursor | None) -> None:
        """Take up the first batch after what was restored."""
        self._restored = False
        link = None if cursor is None else self._link(cursor)
        if link is not self._expected or (cursor is not None and cursor.index > 0):
            self.weighting.leave_plan()
        self.weighting.go_on(cursor, self.steps - self.count)
        self._expected = None
        self._first_index = -1 if cursor is None else cursor.index - self.count

    def _leave_plan_unless_left(self, cursor: Cursor | None) -> None:
        """Take a batch that is not the next one of the pass at hand."""
        last = self._cursor
        if cursor is not None and last is not None and cursor.goes_on_from(last, self._first_index + self.count):
            self._first_index = -self.count  # the loop was left by `break`, and entered again
        else:
            self.weighting.leave_plan()  # a skipped batch, a part of one, another loader

    def _link(self, cursor: Cursor) -> DataLoaderLink | None:
        of_loader = getattr(cursor.loader, "_link", None)
        return next((link for link in self.accumulation.loaders if link is of_loader), None)

    def _global_batch(self, link: DataLoaderLink | None) -> int:
        """Samples, or batches of a batch sampler, in one micro-batch over all ranks; 1 where nobody can know."""
        return 1 if link is None else link.global_stride

    def _check_forward(self) -> None:
        """Ranks synchronise one backward per forward of the prepared model; the gradient of others would stay local."""
        if self.closing and not any(model.was_called for model in self.models):
            if self.num_backward:
                raise StepError(
                    "backward() ran twice without a forward in between, in the micro-batch that synchronises ranks: "
                    "they would keep the second gradient each for itself. Add the losses up and call backward() once."
                )
            raise StepError(
                "the loss did not come through a call of the prepared model, where ranks synchronise: each would keep "
                "its own gradient. Call model(...), not model.forward, a submodule, or the module given to prepare()."
            )
        for model in self.models:
            model.was_called = False

    def finish(self, optimizer: OptimizerLink) -> None:
        """Make the optimizer's gradients those of the window's mean loss: reduce, rescale, unscale. Once a window."""
        if optimizer in self._finished:
            return
        if self._synchronises and self.num_backward == 0:
            raise StepError(
                "the micro-batch that closes the window had no backward(), which is where ranks synchronise. Do not "
                "step there (the window then stays open for the next one), or give backward() a loss of weight=0."
            )
        if not self._finished:
            self._untouched.check(is_open=False)
            if self._synchronises:
                with named_failures(self.accumulation.world):
                    self._reduce()
            else:
                self._reduce()
        self._finished.add(optimizer)
        if self._correction is not None or self.scaler is not None:
            self._correct(optimizer)
        for observer in self.accumulation.observers:
            observer.gradients_ready(optimizer)

    def _correct(self, optimizer: OptimizerLink) -> None:
        gradients = optimizer.gradients()
        fresh = [gradient for gradient in gradients if id(gradient) not in self._done]  # not another optimizer's too
        self._done.update(map(id, gradients))
        if fresh and self._correction is not None:
            torch._foreach_mul_([local(gradient) for gradient in fresh], self._correction)
        if self.scaler is not None:
            if len(fresh) < len(gradients):
                raise StepError(
                    f"{type(optimizer.original).__name__} and another optimizer hold the same parameters and step in "
                    "one window, in float16: their gradients would be unscaled twice. Use bf16, or one optimizer."
                )
            self.scaler.unscale(optimizer.original, gradients)

    def _reduce(self) -> None:
        accumulation = self.accumulation
        for model in self.models:
            model.release_gathered()  # by a forward since the last backward
            model.check_parameters()
            if self._synchronises:
                model.check_unfrozen()
        accumulation.strategy.reduce_gradients([model.wrapped for model in self.models], self._world)
        self._correction = self.weighting.correction()

    def may_zero(self, optimizers: Sequence[OptimizerLink]) -> bool:
        """Whether gradients of `optimizers` may be zeroed now.

        At the start of a window, after the step of any of them, or to discard it all once it closes.
        """
        is_open = self.accumulation.current is self
        if is_open and self.count == 0 and self.num_backward == 0:
            return True
        if not self.closing or not is_open or self.num_backward > 0:
            return self.closing
        return any(optimizer in self.stepped for optimizer in optimizers)

    def _refuse_overlap(self) -> None:
        for other in self.accumulation.open_windows():
            if other is not self and any(model in other.models for model in self.models):
                raise StepError(
                    "accumulate() opens a window of models while another window of some of them is open: their "
                    "gradients would mix. Name the same models together until their window closes."
                )

    def _begin(self, cursor: Cursor | None, steps: int) -> None:
        self._refuse_overlap()
        if self.scaler is not None:
            self.scaler.begin_window()
        self.steps = steps
        self._shares_weight = steps * self._world.size > 1  # alone in its window, a micro-batch is its own mean
        self._first_index = cursor.index if cursor is not None else -1
        self.weighting.begin(cursor, steps)
        self._correction = None
        self._finished.clear()
        self._done.clear()
        self._untouched.forget()
        self.stepped.clear()
        self.count = 0

    def _become_latest(self, *, is_latest: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.window = self
        if is_latest:
            self.accumulation.latest = self

    def _abandon(self) -> None:
        """Drop the window in which an exception arose: what its gradients hold by now is nobody's mean."""
        if self.count > 0:
            _log.warning(
                "an exception inside accumulate() dropped the gradients of %d earlier micro-batches of its window",
                self.count,
            )
        try:
            for model in self.models:
                self.accumulation.strategy.discard_gradients(model.wrapped)
        except StepError as failure:  # for the next micro-batch: the exception that is on its way says more
            self._cannot_go_on = failure
        for optimizer in self.optimizers:
            optimizer.original.zero_grad()
        self.closing = True
        self.count = self.num_backward = 0

    def _keep_local(self) -> None:
        if not self.closing:
            for model in self.models:
                context = self.accumulation.strategy.no_sync(model.wrapped)
                if context is not NOTHING:
                    self._contexts.append(context)
        if self._has_others:
            self._freeze_others()
        for context in self._contexts:
            context.__enter__()

    def _freeze_others(self) -> None:
        """Keep this window's backward out of the gradients of models that have a window of their own.

        In a GAN the generator's loss runs through the discriminator. On one device its gradients there are
        wiped by zero_grad(); inside an open window nothing may be wiped, so they must not arise. Nor may what an
        open window of theirs has summed so far be reduced.
        """
        own = {id(parameter) for model in self.models for parameter in model.original.parameters()}
        for model in self.accumulation.models:
            if model not in self.models and model.is_trained:
                model.bypass = True
                self._contexts.append(self.accumulation.strategy.no_sync(model.wrapped))
                self._frozen += [p for p in model.original.parameters() if p.requires_grad and id(p) not in own]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _thaw_others(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for model in self.accumulation.models:
            model.bypass = False
