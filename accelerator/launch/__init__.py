"""Starting the processes of a job: flags, a plan made of them, torch's elastic agent, and what went wrong."""

from .flags import Request, help_text, parse
from .notebook import notebook_launcher
from .start import launch

__all__ = ["Request", "help_text", "launch", "notebook_launcher", "parse"]
