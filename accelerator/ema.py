"""An exponential moving average of a model's weights: cut as the model is, saved with the run, put in to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from strategies.errors import ConfigurationError, StateError, StepError, listed
from strategies.observer import Observer
from strategies.shards import copy_whole, cut_like, is_sharded, local

if TYPE_CHECKING:
    from strategies.prepared.optimizer import OptimizerLink
    from strategies.window import Window

    from .accelerator import Accelerator


class EMA(Observer):
    """Averaged weights of a prepared model, beside those that are trained.

    After each step that an optimizer really took (not one that a float16 overflow skipped), each of its parameters
    enters: `average = decay * average + (1 - decay) * parameter`; the first time it is copied. These are the numbers of
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, but that averages of 16-bit parameters are
    kept in float32, in which small changes do not vanish. Frozen parameters and buffers are those of the model.

    Every rank makes one, after `prepare` and before `load_state`; it keeps averages of the parts that the rank holds,
    and nothing is communicated. `save_state` and `load_state` keep it, on any strategy and number of processes. Raises
    `ConfigurationError` for a `decay` outside [0, 1], `StepError` for a model that was not prepared.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, *, decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay is {decay}; expected a number from 0 to 1, such as 0.999")
        accelerator._accumulation.refuse_apart("EMA")
        self._link = accelerator._accumulation.link(model)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ConfigurationError(f"{self._link.name} has no parameter that is trained; there is nothing to average")
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._averages = {name: _copy(parameter) for name, parameter in self._parameters.items()}
        self._fresh = set(self._parameters)  # names of those that no step has changed yet
        self._average = get_ema_multi_avg_fn(decay)
        self._is_applied = False
        accelerator._accumulation.observers.append(self)
        accelerator.register_for_checkpointing(self)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the model has the averaged weights: to evaluate it, to `save_model` it.

        At its end, also by an exception, the model has its own again, to the bit; meanwhile they take memory, on each
        rank that of its part. Weights that no step has changed yet are the model's own. Every rank enters it. Inside,
        `backward` and `step` raise `StepError`, `save_state` and `load_state` raise `StateError`.
        """
        if self._is_applied:
            raise StepError("EMA.applied() was entered inside another; the averaged weights are in the model already")
        own = {name: local(parameter.detach()).clone() for name, parameter in self._parameters.items()}
        self._is_applied = True
        try:
            self._put({name: value for name, value in self._averages.items() if name not in self._fresh})
            yield
        finally:
            self._put(own)
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """The averages by the names of their parameters, cut as they are. For `save_state`, which calls it."""
        if self._is_applied:
            raise StateError(
                f"a checkpoint was asked for inside EMA.applied(), where {self._link.name} has the averaged weights in "
                "place of its own. Save and load after the block."
            )
        return {"averages": dict(self._averages), "fresh": sorted(self._fresh)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with averages that any strategy wrote: cut as they are here, or whole."""
        averages = state["averages"]
        differing = sorted(averages.keys() ^ self._averages.keys())
        if differing:
            raise StateError(
                f"the averages to load are of other parameters than those that {self._link.name} trains: "
                f"{listed(differing)}"
            )
        for name, average in self._averages.items():
            if is_sharded(averages[name]):
                local(average).copy_(local(averages[name]))
            else:
                copy_whole(averages[name], average)
        self._fresh = set(state["fresh"])

    # -- what the loop tells -------------------------------------------------------------------------------

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """Refuse to train averaged weights."""
        if self._is_applied and self._link in window.models:
            raise StepError(
                f"backward() ran inside EMA.applied(), where {self._link.name} has the averaged weights in place of "
                "those that are trained. Evaluate there, and train after the block."
            )

    def update_begun(self, optimizer: OptimizerLink) -> None:
        """Refuse a step that would be lost, or whose parameters would be left out."""
        if self._link not in optimizer.models:
            return
        if self._is_applied:
            raise StepError(
                f"an optimizer stepped inside EMA.applied(), where {self._link.name} has the averaged weights in place "
                "of those that are trained. Evaluate there, and step after the block."
            )
        strange = [p for p in optimizer.parameters() if id(p) not in self._names and p.grad is not None]
        if any(self._link.find(parameter) is not None for parameter in strange):
            raise StepError(
                f"a parameter of {self._link.name} was frozen when its EMA was made, and is trained now: its average "
                "would be left out. Unfreeze parameters before."
            )

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """Average what the optimizer has changed."""
        if not taken or self._link not in optimizer.models:
            return
        held = [(self._names[id(p)], p) for p in optimizer.parameters() if id(p) in self._names]
        averages, parameters = [], []
        with torch.no_grad():
            for name, parameter in held:
                average, current = local(self._averages[name]), local(parameter.detach())
                if name in self._fresh:
                    average.copy_(current)
                    self._fresh.remove(name)
                else:
                    averages.append(average)
                    parameters.append(current.to(average.dtype))
            if averages:
                self._average(averages, parameters, 1)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        self._link.release_gathered()
        with torch.no_grad():
            for name, value in values.items():
                local(self._parameters[name].detach()).copy_(local(value))


def _copy(parameter: nn.Parameter) -> Tensor:
    """A copy on the same device, cut in the same way; in float32 if it has 16 bits."""
    is_narrow = parameter.dtype in (torch.float16, torch.bfloat16)
    copied = parameter.detach().to(torch.float32 if is_narrow else parameter.dtype, copy=True)
    return copied if is_sharded(copied) else cut_like(copied, parameter.detach())
