"""Configuration: which settings exist, where their values come from, and which value wins.

Layers, lowest first: defaults, `accelerator.toml`, `ACCELERATOR_*` variables, launch flags, code.
"""

from .layers import CONFIG_VARIABLE, FLAGS_VARIABLE
from .resolve import Resolved, resolve_settings
from .settings import NOT_GIVEN, LaunchSettings, NotGiven, Settings, given

__all__ = [
    "CONFIG_VARIABLE",
    "FLAGS_VARIABLE",
    "NOT_GIVEN",
    "LaunchSettings",
    "NotGiven",
    "Resolved",
    "Settings",
    "given",
    "resolve_settings",
]
