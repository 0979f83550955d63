"""Checkpoints: a run stopped anywhere goes on as if nothing had happened. Whole or absent, verified when read."""

from .checkpoint import load, resume, save
from .folder import name_of

__all__ = ["load", "name_of", "resume", "save"]
