"""One HTML page about runs, from what they left in their folders."""

from .page import page
from .read import RunData, read_run

__all__ = ["RunData", "page", "read_run"]
