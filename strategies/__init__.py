"""Where a training loop meets its hardware: the contract of a strategy, the built-in ones, and what they share."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import registry as _registry
from .base import Strategy
from .ddp import DDP
from .errors import (
    AcceleratorError,
    CollectiveError,
    ConfigurationError,
    ConformanceError,
    DataError,
    LaunchError,
    NonfiniteError,
    PeerLostError,
    PrepareError,
    ReplicasDifferError,
    ShapeMismatchError,
    StateError,
    StepError,
)
from .precision import Precision
from .single import CPU, SingleDevice
from .world import World

if _TYPE_CHECKING:
    from .fsdp import FSDP
    from .xla import XLA

__all__ = [
    "CPU",
    "DDP",
    "FSDP",
    "XLA",
    "AcceleratorError",
    "CollectiveError",
    "ConfigurationError",
    "ConformanceError",
    "DataError",
    "LaunchError",
    "NonfiniteError",
    "PeerLostError",
    "Precision",
    "PrepareError",
    "ReplicasDifferError",
    "ShapeMismatchError",
    "SingleDevice",
    "StateError",
    "StepError",
    "Strategy",
    "World",
]


def __getattr__(name: str) -> _Any:
    if name in ("FSDP", "XLA"):  # what most runs do not use is imported when it is asked for
        return _registry.resolve(name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
