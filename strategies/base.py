"""The contract between a training loop and its hardware: ten methods a strategy must write.

A strategy is a frozen dataclass: its fields are its settings, its methods are its behaviour. The first ten
methods below are abstract, so that one an author forgets fails at construction and not in a run. The others
are right for any strategy that places a whole model on one device.
Everything that all strategies share (finding parameters again after wrapping, gating the optimizer,
cutting the data) is written once, in `strategies.prepared`, and is not for a subclass to replace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .blocks import class_name
from .errors import ConfigurationError
from .init_module import born_on
from .precision import Precision
from .world import World

NOTHING = nullcontext()  # a context that does nothing, which may be entered again and again


class Exchange(NamedTuple):
    """How long ranks exchanged the gradients of one window, as somebody measured it without waiting for it.

    `number`: which window of this process it was, from 1. `seconds`: from the start of the first transfer to the end of
    the last, with the wait for slower ranks. `hidden`: of these, the seconds in which backward computed beside it.
    """

    number: int
    seconds: float
    hidden: float


@dataclass(frozen=True)
class Strategy(ABC):
    """How a loop meets its hardware.

    Every method is called on every rank, in the same order. `wrapped` is always what this strategy's
    own `wrap` returned. `single_process` says of a class that it trains in one process only, whose `setup` refuses
    several: asked before anything is started.
    """

    single_process: ClassVar[bool] = False

    @abstractmethod
    def setup(self) -> World:
        """Join the processes that the environment describes, pick the device, and say where this one stands.

        Called once per `Accelerator`. Joining a process group that exists already returns the same facts.
        Raises `LaunchError` if the environment does not fit the strategy.
        """

    @abstractmethod
    def teardown(self, world: World) -> None:
        """Leave what `setup` joined. Called once, after every wrapped model was freed."""

    @abstractmethod
    def wrap(self, model: nn.Module, world: World, precision: Precision) -> nn.Module:
        """Place `model` on its device(s) and make its backward synchronise gradients.

        May change `model` in place (parameters may be replaced: optimizers are re-pointed by name). Ranks
        leave it with the same weights, rank 0's.
        Raises `ConfigurationError` or `PrepareError` for a model that this strategy cannot train right.
        """

    @abstractmethod
    def unwrap(self, wrapped: nn.Module) -> nn.Module:
        """The user's own module inside what `wrap` returned."""

    @abstractmethod
    def autocast(self, world: World, precision: Precision) -> AbstractContextManager[Any]:
        """A new context in which one forward pass runs in `precision`."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A context around the forward and backward of a micro-batch that does not close its window.

        `NOTHING` where there is nobody to synchronise with, which is then not entered.
        """

    @abstractmethod
    def reduce_gradients(self, wrapped: Sequence[nn.Module], world: World) -> None:
        """Finish the mean of gradients over ranks for these models, where backward has not done it.

        Called once per window, after its last backward and before gradients are scaled, clipped and used.
        """

    @abstractmethod
    def discard_gradients(self, wrapped: nn.Module) -> None:
        """Drop what a forward or backward that ended in an exception left behind `.grad`, on every rank alike.

        Called before the gradients of the optimizers are zeroed. Raises `StepError` if training cannot go on.
        """

    @abstractmethod
    def mark_step(self, world: World) -> None:
        """Run what was recorded, on hardware that records. Called after every update.

        Called also between batches that are not trained on, so that an evaluation does not record without end.
        """

    @abstractmethod
    def device_loader(self, batches: Iterator[Any], world: World) -> Iterator[Any]:
        """Yield the same batches, in the same order, on the device of this rank."""

    def init_context(self, world: World, *, empty: bool) -> AbstractContextManager[Any]:
        """A context in which a model is built, with its parameters where `wrap` wants them.

        With `empty`, they hold NaN: they will be loaded.
        """
        return born_on(world.device, empty=empty)

    def open_gradients(self, wrapped: nn.Module, world: World) -> dict[str, Tensor]:
        """The gradients that an open window has summed on this rank, by the names of their parameters.

        Whole ones are not averaged over ranks yet; those that are cut over ranks are. Not a collective.
        """
        named = self.unwrap(wrapped).named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def set_open_gradients(self, wrapped: nn.Module, gradients: Mapping[str, Tensor], world: World) -> None:
        """Go on with an open window that has summed `gradients`: whole, and not averaged over ranks yet. Collective."""
        for name, parameter in self.unwrap(wrapped).named_parameters():
            parameter.grad = gradients[name].to(parameter) if name in gradients else None

    def train_alone(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A context in which this rank trains its copy of a model by itself, for `LocalSGD`.

        Inside, `reduce_gradients` gets a world of one. Raises `ConfigurationError` where ranks cannot train apart.
        """
        raise ConfigurationError(
            f"LocalSGD has each rank train a whole copy of {class_name(wrapped)} by itself, which "
            f"{type(self).__name__} does not offer. Use strategy='ddp', or LocalSGD(..., enabled=False)."
        )

    @property
    def buffers_agree(self) -> bool:
        """Whether all ranks have the same buffers after an update."""
        return True

    def seed(self, value: int, world: World) -> None:  # noqa: B027  # nothing to do is right for most
        """Seed the generators of devices that `torch.manual_seed` does not reach. Called where a seed is configured."""

    def last_exchange(self, wrapped: nn.Module) -> Exchange | None:
        """The window measured last, for the timers; `None` where nobody measures. Not a collective, and waits for none.

        Called now and then, between micro-batches.
        """
        return None

    def describe(self, wrapped: nn.Module, world: World) -> Mapping[str, str]:
        """What `wrap` made of a model, name and words, for `Accelerator.explain()`."""
        return {}
