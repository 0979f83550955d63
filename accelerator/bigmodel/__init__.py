"""Models larger than a device, or than memory: built without memory, loaded in place, spread out and run."""

from .build import init_empty_weights, init_on_device
from .load import IncompatibleKeys, load_checkpoint_in_model

__all__ = [
    "IncompatibleKeys",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_in_model",
]
