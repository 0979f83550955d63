"""Models larger than a device, or than memory: built without memory, loaded in place, spread out and run."""

from .build import init_empty_weights, init_on_device
from .device_map import describe_device_map, get_max_memory, infer_auto_device_map
from .dispatch import (
    OffloadHook,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    remove_dispatch,
)
from .load import IncompatibleKeys, load_checkpoint_in_model
from .quantize import quantization_errors

__all__ = [
    "IncompatibleKeys",
    "OffloadHook",
    "cpu_offload",
    "cpu_offload_with_hook",
    "describe_device_map",
    "disk_offload",
    "dispatch_model",
    "get_max_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "quantization_errors",
    "remove_dispatch",
]
