"""What `prepare` hands out: views of the user's model, optimizer, scheduler and dataloader."""

from .alike import Fact
from .options import DataOptions
from .prepare import prepare
from .view import View

__all__ = ["DataOptions", "Fact", "View", "prepare"]
