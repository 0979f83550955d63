"""Arguments that functions of the same names have in Accelerate, and not here: errors say what stands for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from accelerator.accelerate_words import answering

P = ParamSpec("P")
R = TypeVar("R")

_ALL_FOLLOW = "leave it out: all tensors among the inputs follow the weights"
_EACH_READS = "leave it out: every process maps the checkpoint for itself"
_INSTEAD = {
    "no_split_module_classes": "it is no_split_classes here, and the repeated blocks without it",
    "preload_module_classes": "give dispatch_model no_split_classes, whose modules are fetched whole",
    "offload_dir": "it is offload_folder here, and only for weights that are in no file that can be mapped",
    "offload_index": "leave it out: weights that were loaded from files stay in them",
    "offload_buffers": "leave it out: buffers are small, and stay where they are used",
    "include_buffers": "leave it out: buffers are made on the device too",
    "offload_state_dict": "leave it out: one tensor at a time is loaded",
    "state_dict": "leave it out: the model's own weights are used",
    "skip_keys": _ALL_FOLLOW,
    "force_hooks": "leave it out: hooks are attached where something has to move",
    "full_state_dict": _EACH_READS,
    "broadcast_from_rank0": _EACH_READS,
    "special_dtypes": "leave it out, and dtype too: the model's own dtypes count, such as those of init_on_device",
    "keep_in_fp32_modules": "leave it out, and dtype too: weights get the dtype that they have in the model",
    "offload_8bit_bnb": "quantize='int8' loads in 8 bits, through torchao",
    "verbose": "print(describe_device_map(model, device_map))",
    "clean_result": "leave it out: the map has as few names as it takes",
    "fallback_allocation": "leave it out: parts are placed in the order in which they run",
}


def unlike_accelerate(function: Callable[P, R]) -> Callable[P, R]:
    """Have `function` raise a `TypeError` for an argument that only Accelerate's function of its name has."""
    own = inspect.signature(function).parameters
    return answering(function, {name: words for name, words in _INSTEAD.items() if name not in own}, function.__name__)
