"""Making an `accelerator.toml`: questions with what was detected as default, or another library's configuration."""

from .accelerate import Conversion, Fate, convert
from .questions import Machine, ask, detect
from .show import table_of
from .write import render, save

__all__ = ["Conversion", "Fate", "Machine", "ask", "convert", "detect", "render", "save", "table_of"]
