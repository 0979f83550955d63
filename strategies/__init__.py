"""Where a training loop meets its hardware: the contract of a strategy, the built-in ones, and what they share."""

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
from .fsdp import FSDP
from .precision import Precision
from .single import CPU, SingleDevice
from .world import World
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
