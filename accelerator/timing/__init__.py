"""Where the time of a run goes, measured as it runs: one file of JSON lines for each rank."""

from .timers import PHASES, Timers

__all__ = ["PHASES", "Timers"]
