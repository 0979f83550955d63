"""All windows of one Accelerator's loop, and the objects that it prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import Strategy
from .errors import StepError
from .precision import Precision
from .sources import Cursor, Sources
from .window import Window
from .world import World

if TYPE_CHECKING:
    from .prepared.dataloader import DataLoaderLink
    from .prepared.model import ModelLink
    from .prepared.optimizer import OptimizerLink


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
                named = ", ".join(type(model.original).__name__ for model in missing)
                raise StepError(
                    f"{type(optimizer.original).__name__} also holds parameters of {named}, which accumulate() does "
                    "not name. Name every model that one optimizer trains: accumulate(encoder, decoder)."
                )
        return Window(self, models)
