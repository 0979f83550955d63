"""Looking at a machine before a run: what is here, whether processes reach each other, and how fast."""

from .examine import examine
from .report import environment_report

__all__ = ["environment_report", "examine"]
