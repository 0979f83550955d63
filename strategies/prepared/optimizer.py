"""The optimizer that `prepare` returns: it steps and zeroes only where a window closes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from ..errors import PrepareError, StepError
from ..shards import cut_like, is_sharded
from .trial_step import refuse_unless_it_steps
from .view import View, make_view

if TYPE_CHECKING:
    from ..accumulation import Accumulation
    from ..window import Window
    from .model import ModelLink

_log = logging.getLogger("accelerator")


class _GatedStep:
    """`step` of a prepared optimizer, found before the one that schedulers of torch set on the instance."""

    hooked = True  # tells Optimizer.__setstate__ not to wrap it: the user's own step has its profiling hook

    def __get__(self, view: Any, owner: type | None = None) -> Any:
        return self if view is None else view._link.step

    def __set__(self, view: Any, step: Callable[..., Any]) -> None:
        view._link.original.step = step


class PreparedOptimizer(View):
    """What comes before the user's own methods in a prepared optimizer."""

    __slots__ = ()

    step = _GatedStep()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients, except of an accumulation window that is still open."""
        link = self._link
        window = link.window
        if window is not None and window.num_backward and not window.closing:
            return  # as `may_zero` would say, without its call: most micro-batches end here
        if window is None or window.may_zero((link,)):
            link.original.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the user's optimizer, which shares its state with this view. Whole state is cut like parameters."""
        original = self._link.original
        original.load_state_dict(state_dict)
        for parameter, values in original.state.items():
            for name, value in values.items():
                values[name] = _placed(name, value, parameter, parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of models that are prepared."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        link = self._link
        link.accumulation.forget_windows()  # this optimizer may belong to other models' windows from now on
        link.original.add_param_group({**param_group, "params": link.adopt(params)})


class OptimizerLink:
    """What a prepared optimizer knows: the user's optimizer, its models, its window and what its last step did."""

    def __init__(self, original: Optimizer, accumulation: Accumulation) -> None:
        self.original = original
        self.accumulation = accumulation
        self.window: Window | None = None
        self.num_steps = 0  # steps really taken
        self.last_call: Literal["none", "held", "skipped", "taken"] = "none"
        self.models: list[ModelLink] = []
        self._repoint()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step if the window closes with this micro-batch; do nothing while it is open.

        At a close, in this order: gradients are reduced, rescaled by the window's true weight where it was
        not known before, unscaled (float16); then clipped, where the loop asked for it; checked to be finite
        on all ranks; used. The scheduler follows in the loop, and `mark_step` at the end of the micro-batch.
        """
        accumulation, window = self.accumulation, self.window
        current = accumulation.current
        if current is not None and current is not window:
            trained = ", ".join(model.name for model in self.models)
            raise StepError(
                f"{type(self.original).__name__} of {trained} stepped inside an accumulate() that does not name its "
                "models. Name them: accumulate(model), or accumulate(first, second) for a loss through both."
            )
        if closure is not None:
            return self._step_with(closure, window)
        if window is not None and not window.closing:
            self.last_call = "held"
            return None
        if window is None or (window.num_backward == 0 and window.count == 0):
            self._refuse_foreign_gradients()
            self.original.step()
            return None
        window.finish(self)
        window.stepped.add(self)
        for observer in accumulation.observers:
            observer.update_begun(self)
        for model in self.models:
            model.release_gathered()
        if window.scaler is None:
            self.original.step()
        elif not window.scaler.step(self.original):
            self._note_skip()
            return None
        self._note_step()
        if current is None:
            accumulation.strategy.mark_step(accumulation.world)
        return None

    @property
    def is_held(self) -> bool:
        """Whether the last step was held back or skipped, or its window is open."""
        return self.last_call in ("held", "skipped") or (self.window is not None and not self.window.closing)

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of the parameter groups."""
        return [parameter for group in self.original.param_groups for parameter in group["params"]]

    def gradients(self) -> list[Tensor]:
        """The gradients that exist, in the order of the parameter groups."""
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]

    def adopt(self, parameters: list[Tensor]) -> list[Tensor]:
        """The live parameters behind `parameters`. Raises `PrepareError` for one of no prepared model."""
        live: list[Tensor] = []
        strangers: list[Tensor] = []
        for parameter in parameters:
            for model in self.accumulation.models:
                found = model.find(parameter)
                if found is not None:
                    live.append(found)
                    if model not in self.models:
                        self.models.append(model)
                    break
            else:
                strangers.append(parameter)
        if strangers:
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in strangers[:5])
            shapes += ", ..." if len(strangers) > 5 else ""
            raise PrepareError(
                f"{type(self.original).__name__} holds {len(strangers)} of {len(parameters)} parameters that belong to "
                f"no prepared model (shapes {shapes}). Give their model to the same prepare(), "
                "or build the optimizer from the model that prepare() returned."
            )
        return live

    def _note_step(self) -> None:
        self.num_steps += 1
        self.last_call = "taken"
        self.accumulation.step_was_skipped = False
        self.original._opt_called = True  # type: ignore[attr-defined]  # schedulers of torch look for it
        for observer in self.accumulation.observers:
            observer.update_ended(self, taken=True)

    def _note_skip(self) -> None:
        self.last_call, self.accumulation.step_was_skipped = "skipped", True
        if self.accumulation.world.is_main:
            _log.warning("float16 overflow: optimizer and scheduler skip this step, the loss scale is lowered")
        for observer in self.accumulation.observers:
            observer.update_ended(self, taken=False)

    def _repoint(self) -> None:
        """Put the live parameters where the optimizer holds the ones from before wrapping, with their state."""
        state = self.original.state
        for group in self.original.param_groups:
            before = group["params"]
            group["params"] = self.adopt(before)
            for old, new in zip(before, group["params"], strict=True):
                if old is not new and old in state:
                    state[new] = {name: _placed(name, value, old, new) for name, value in state.pop(old).items()}
        if any(is_sharded(parameter) or parameter.device.type == "xla" for parameter in self.parameters()):
            refuse_unless_it_steps(self.original)

    def _step_with(self, closure: Callable[[], Any], window: Window | None) -> Any:
        accumulation = self.accumulation
        reason = None
        if accumulation.world.size > 1:
            reason = f"on {accumulation.world.size} processes each would decide by its own loss"
        elif window is not None and window.steps > 1:
            reason = "a window of several micro-batches cannot be computed again"
        elif accumulation.precision.scales_loss:
            reason = "the float16 loss scale does not support it"
        if reason is not None:
            raise StepError(
                f"{type(self.original).__name__}.step got a closure, but {reason}. Step without a closure, or use one "
                "process, no accumulation, and 'no' or 'bf16' precision."
            )
        for observer in accumulation.observers:
            observer.update_begun(self)
        loss = self.original.step(closure)
        if window is not None:
            window.stepped.add(self)
        self._note_step()
        return loss

    def _refuse_foreign_gradients(self) -> None:
        if self.gradients():
            raise StepError(
                f"{type(self.original).__name__}.step found gradients that no accelerator.backward(loss) made. Call "
                "accelerator.backward(loss) instead of loss.backward(); for gradients you computed yourself, "
                "step the optimizer that you gave to prepare()."
            )


def _placed(name: str, value: Any, old: Tensor, new: Tensor) -> Any:
    """State of a parameter, where the parameter is now: what has its shape is cut alike, anything else is kept."""
    if name == "step" or not isinstance(value, Tensor) or value.shape != old.shape:  # torch counts steps on the CPU
        return value
    if is_sharded(value):
        return value
    return cut_like(value.to(new.device), new.detach())


# Tells a scheduler that is built from the view not to put its own wrapper over the gate: the wrapper only
# sets `_opt_called`, which `OptimizerLink` does too.
OptimizerLink.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def prepare_optimizer(optimizer: Optimizer, accumulation: Accumulation) -> Optimizer:
    """`optimizer` re-pointed to the live parameters, behind a view that is still an instance of its class."""
    link = OptimizerLink(optimizer, accumulation)
    accumulation.optimizers.append(link)
    return make_view(optimizer, PreparedOptimizer, link)  # type: ignore[return-value]  # also of the user's class
