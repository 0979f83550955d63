"""Checkpoints: a run stopped anywhere goes on as if nothing had happened. Whole or absent, verified when read."""

from .checkpoints import Checkpoints
from .retention import Keep

__all__ = ["Checkpoints", "Keep"]
