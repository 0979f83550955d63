"""All windows of one Accelerator's loop, and the objects that it prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import Strategy
from .blocks import class_name
from .errors import StateError, StepError
from .observer import Observer
from .precision import Precision
from .prepared.view import View
from .scaling import LossScaler
from .sources import Cursor, Sources
from .window import Window
from .world import World

if TYPE_CHECKING:
    from .prepared.dataloader import DataLoaderLink
    from .prepared.model import ModelLink
    from .prepared.optimizer import OptimizerLink
    from .prepared.scheduler import SchedulerLink


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
        self.step_world = world  # the ranks whose samples one step averages over; `LocalSGD` makes it this one
        self.precision = precision
        self.steps_for = steps_for
        self.sources = Sources(world, self._steps_alike)
        self.models: list[ModelLink] = []
        self.optimizers: list[OptimizerLink] = []
        self.schedulers: list[SchedulerLink] = []
        self.loaders: list[DataLoaderLink] = []
        self.given: list[Any] = []  # the user's own objects that were prepared
        self.observers: list[Observer] = []
        self.current: Window | None = None  # the window whose micro-batch is open
        self.latest: Window | None = None
        self.step_was_skipped = False
        self._windows: dict[tuple[nn.Module, ...], Window] = {}  # by the models as they are given
        self._shared: dict[tuple[ModelLink, ...], Window] = {}
        self._scalers: dict[tuple[ModelLink, ...], LossScaler] = {}

    def window(self, models: tuple[nn.Module, ...] = ()) -> Window:
        """The window of these prepared models; of all of them without any."""
        try:
            window = self._windows.get(models)
        except TypeError:  # not hashable, such as a list of models: `link` says what is wrong with it
            window = None
        if window is None:
            named = [self.link(model) for model in models] or self.models
            links = tuple(link for link in self.models if link in named)  # in whatever order they were named
            window = self._windows[models] = self._shared.get(links) or self._make_window(links)
        return window

    def link(self, model: nn.Module) -> ModelLink:
        """What a prepared model knows. Raises `StepError` for one that was not prepared here."""
        if isinstance(model, View):
            known: ModelLink = model._link
            if known in self.models:
                return known
        raise StepError(
            f"{class_name(model)} was not prepared by this Accelerator. Use the model that prepare() returned; "
            "name several one after the other: accumulate(first, second)."
        )

    @property
    def steps_taken(self) -> int:
        """Optimizer steps really taken, of the optimizer that has taken most; 0 without any."""
        return max((optimizer.num_steps for optimizer in self.optimizers), default=0)

    @property
    def moves(self) -> tuple[int, ...]:
        """What changes as the loop goes on, for another thread to compare."""
        cursor, window = self.sources.latest, self.latest
        batch = (id(cursor), cursor.index) if cursor is not None else ()
        return (*batch, *((window.count, window.num_backward) if window is not None else ()), self.steps_taken)

    def _steps_alike(self) -> list[int]:
        """Steps taken by each optimizer, which must be as many on all ranks; of none while each trains alone."""
        return [] if self.trains_alone else [optimizer.num_steps for optimizer in self.optimizers]

    @property
    def trains_alone(self) -> bool:
        """Whether each rank steps by its own samples only, so that ranks hold different weights."""
        return self.step_world is not self.world

    def refuse_apart(self, call: str) -> None:
        """Raise `StateError` where ranks hold different weights, of which `call` would take one or a mixture."""
        if self.trains_alone:
            raise StateError(
                f"{call}() was called inside LocalSGD, where each rank has weights of its own. Call it after the "
                "block, whose end averages them."
            )

    def train_alone(self, alone: bool) -> None:
        """Have steps be of this rank's samples only, or of all ranks' again. Raises `StepError` in an open window."""
        self.forget_windows()
        self.step_world = replace(self.world, rank=0, size=1) if alone else self.world

    def open_windows(self) -> list[Window]:
        """The windows that wait for further micro-batches."""
        return [window for window in self._shared.values() if not window.closing]

    def forget_windows(self) -> None:
        """Group models anew, because more were prepared. Raises `StepError` inside an open window.

        Loss scales stay with their models.
        """
        if self.current is not None or self.open_windows():
            raise StepError(
                "models or parameters were added inside an open accumulation window. Add them before the loop, or "
                "between windows (accelerator.sync_gradients is true there)."
            )
        self._windows.clear()
        self._shared.clear()

    def finish(self, parameters: Iterable[Tensor] | Tensor) -> list[Tensor] | None:
        """Make the gradients of `parameters` ready to be clipped, and list them. `None` while their window is open.

        Raises `StepError` if no prepared optimizer holds any of them.
        """
        current = self.current
        if current is not None and not current.closing and len(current.models) == len(self.models):
            return None  # whoever holds them waits, and nobody needs to walk through a model for them
        held = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        owners = {id(p): optimizer for optimizer in self.optimizers for p in optimizer.parameters()}
        found = list(dict.fromkeys(owners[id(p)] for p in held if id(p) in owners))
        if not found:
            raise StepError(
                f"clipping got {len(held)} parameters, none of which a prepared optimizer holds. "
                "Give parameters of a model that prepare() returned: model.parameters()."
            )
        windows = {owner: owner.window for owner in found if owner.window is not None}
        is_open = {not window.closing for window in windows.values()}
        if is_open == {True, False}:
            raise StepError(
                "clipping got parameters of two windows, one of which is still open. Clip the parameters of each "
                "window by themselves."
            )
        if is_open != {False}:
            return None
        for owner, window in windows.items():
            window.finish(owner)
        return held

    def release(self) -> None:
        """Let go of everything prepared, so that it can be freed before the process group is left."""
        for model in self.models:
            model.release()
        for windows in (self._windows, self._shared, self._scalers):
            windows.clear()
        for held in (self.models, self.optimizers, self.schedulers, self.loaders, self.given, self.observers):
            held.clear()
        self.current = self.latest = None
        self.sources = Sources(self.world, self._steps_alike)

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Loss scales and mean weights of all windows, by the names of their models (`names`, by identity).

        Raises `StateError` inside a micro-batch.
        """
        if self.current is not None:
            raise StateError(
                "a checkpoint was asked for inside accumulate(), where a micro-batch is half done. Save after the "
                "block."
            )
        return {
            "scalers": {_joined(models, names): scaler.state_dict() for models, scaler in self._scalers.items()},
            "units": {_joined(models, names): window.weighting.unit for models, window in self._shared.items()},
        }

    def open_state(self, names: Mapping[int, str]) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Tensor]]]]:
        """The open windows of this rank by the names of their models: their state, and gradients by model and name."""
        found = {}
        for window in self.open_windows():
            gradients = {
                names[id(model)]: self.strategy.open_gradients(model.wrapped, self.world) for model in window.models
            }
            found[_joined(window.models, names)] = window.state_dict(), gradients
        return found

    def load_state_dict(self, state: Mapping[str, Any], models: Mapping[str, ModelLink]) -> None:
        """Go on with the scales and weights of `state`; `models` are by the names that it uses."""
        for window in self.open_windows():  # what it has summed belongs to the run that is left
            window.closing = True
            for model in window.models:
                self.strategy.set_open_gradients(model.wrapped, {}, self.world)
        self.forget_windows()
        for joined, values in state["scalers"].items():
            if self.precision.scales_loss:
                links = self._links(joined, models)
                self._scalers.setdefault(links, LossScaler(self.world)).load_state_dict(values)
        for joined, unit in state["units"].items():
            self._make_window(self._links(joined, models)).weighting.unit = unit

    def load_open_state(
        self, joined: str, states: Sequence[Mapping[str, Any]], models: Mapping[str, ModelLink]
    ) -> None:
        """Go on inside a window; `states` are those that all ranks had."""
        self._shared[self._links(joined, models)].load_state_dict(states)

    def _links(self, joined: str, models: Mapping[str, ModelLink]) -> tuple[ModelLink, ...]:
        named = [models[name] for name in joined.split("+")]
        return tuple(link for link in self.models if link in named)

    def optimizers_of(self, models: Sequence[ModelLink]) -> list[OptimizerLink]:
        """The optimizers that hold parameters of any of `models`."""
        return [optimizer for optimizer in self.optimizers if any(model in optimizer.models for model in models)]

    def window_alone(self) -> Window:
        """A window of one micro-batch, for a backward outside `accumulate`.

        Raises `StepError` where that backward would not do what was configured.
        """
        if self.steps_for(self.sources.training()) > 1:
            raise StepError(
                "backward() ran outside accumulate() although gradients are to be accumulated over several "
                "micro-batches. Put forward, backward and step inside `with accelerator.accumulate(model):`."
            )
        if self.precision.scales_loss and len(self.optimizers) > 1:
            raise StepError(
                f"backward() ran outside accumulate() with float16 and {len(self.optimizers)} optimizers, whose "
                "loss scales must not mix. Put each loss inside `with accelerator.accumulate(its_model):`."
            )
        window = self.window()
        window.begin_alone()
        return window

    def _make_window(self, models: tuple[ModelLink, ...]) -> Window:
        for optimizer in self.optimizers_of(models):
            missing = [model for model in optimizer.models if model not in models]
            if missing:
                named = ", ".join(model.name for model in missing)
                raise StepError(
                    f"{type(optimizer.original).__name__} also holds parameters of {named}, which accumulate() does "
                    "not name. Name every model that one optimizer trains: accumulate(encoder, decoder)."
                )
        if self.precision.scales_loss:
            self._scalers.setdefault(models, LossScaler(self.world))
        window = self._shared[models] = Window(self, models, self._scalers.get(models))
        return window


def _joined(models: Sequence[ModelLink], names: Mapping[int, str]) -> str:
    return "+".join(names[id(model)] for model in models)
