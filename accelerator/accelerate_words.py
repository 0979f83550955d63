"""Words of Hugging Face's Accelerate that mean nothing here: who says one is told what to say instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_PLACED = "prepare() places what it returns; move other tensors with .to(accelerator.device)"
_SAFE = "weights are always written as safetensors, and nothing that runs code when it is read"
_SPELLED_OUT = "write `if accelerator.{}:` around it"
_FOUND = "accelerator.explain() prints what was asked and what runs"

ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "__init__": {
        "device_placement": _PLACED,
        "cpu": "say strategy='cpu', or strategy=DDP(device='cpu') for several processes",
        "dataloader_config": "split_batches= and dispatch_batches= are arguments of their own; each sample comes once "
        "an epoch, in an order that seed= decides",
        "deepspeed_plugin": "DeepSpeed is not here; strategy=FSDP(...) cuts parameters, gradients and optimizer state",
        "deepspeed_plugins": "DeepSpeed is not here; strategy=FSDP(...) cuts parameters, gradients and optimizer state",
        "fsdp_plugin": "say strategy=FSDP(...), whose fields are the plugin's words, or strategy='fsdp' and a table "
        "[fsdp] in accelerator.toml; `accelerator config convert FILE` writes it from Accelerate's file",
        "torch_tp_plugin": "tensor parallelism is not here; strategy=FSDP(...) cuts parameters",
        "megatron_lm_plugin": "Megatron-LM is not here; strategy=FSDP(...) cuts parameters",
        "parallelism_config": "say strategy=FSDP(replicate=..., shard=...)",
        "rng_types": "seed= seeds the generators of Python, NumPy and torch, and the order of the data",
        "log_with": "say trackers=['tensorboard'], and accelerator.log(config={...}) for what init_trackers() took",
        "project_config": "say project_dir=, and save_state(keep_last=...) for how many checkpoints to keep",
        "gradient_accumulation_plugin": "say gradient_accumulation_steps=, or global_batch_size=",
        "step_scheduler_with_optimizer": "scheduler.step() counts once for each optimizer step that is taken; a "
        "scheduler that is to step otherwise is not given to prepare()",
        "kwargs_handlers": "settings belong to the strategy: DDP(find_unused_parameters=True, timeout_seconds=600)",
        "dynamo_backend": "call torch.compile(model) before prepare(), or say strategy=FSDP(compile=True)",
        "dynamo_plugin": "call torch.compile(model) before prepare(), or say strategy=FSDP(compile=True)",
    },
    "prepare": {"device_placement": _PLACED},
    "autocast": {"autocast_handler": "say torch.autocast(accelerator.device.type, ...) for settings of your own"},
    "profile": {"profile_handler": "its settings are arguments: profile(folder, wait=1, active=3, with_stack=True)"},
    "log": {"log_kwargs": "give a tracker of your own, with its settings, in Accelerator(trackers=[...])"},
    "get_state_dict": {"unwrap": "the names are always those of your own module"},
    "save_model": {"save_directory": "it is called folder", "safe_serialization": _SAFE},
    "save_state": {"output_dir": "it is called path", "safe_serialization": _SAFE},
    "load_state": {"input_dir": "it is called path", "load_kwargs": "there is nothing to set: names and shapes decide"},
}

ATTRIBUTES: Mapping[str, str] = {
    "state": _FOUND,
    "distributed_type": f"accelerator.strategy is the strategy; {_FOUND}",
    "use_distributed": "say accelerator.num_processes > 1",
    "multi_device": "say accelerator.num_processes > 1",
    "is_last_process": "say accelerator.process_index == accelerator.num_processes - 1",
    "on_local_main_process": _SPELLED_OUT.format("is_local_main_process"),
    "on_last_process": _SPELLED_OUT.format("process_index == accelerator.num_processes - 1"),
    "on_process": _SPELLED_OUT.format("process_index == 3"),
    "on_local_process": _SPELLED_OUT.format("local_process_index == 3"),
    "prepare_model": "prepare() takes any objects, in any order",
    "prepare_optimizer": "prepare() takes any objects, in any order",
    "prepare_scheduler": "prepare() takes any objects, in any order",
    "prepare_data_loader": "prepare() takes any objects, in any order",
    "unscale_gradients": "gradients are unscaled by accelerator.clip_grad_norm_() and clip_grad_value_(), and for the "
    "optimizer's step by itself",
    "trigger_sync_in_backward": "accumulate() knows which micro-batch closes its window",
    "join_uneven_inputs": "leave it out: a rank without samples computes one that weighs nothing",
    "skip_first_batches": "leave it out: resume() and load_state() go on at the next batch of the epoch",
    "init_trackers": "say Accelerator(trackers=['tensorboard']), and accelerator.log(config={...})",
    "get_tracker": "build the tracker, keep it, and give it to Accelerator(trackers=[tracker])",
    "trackers": "build the tracker, keep it, and give it to Accelerator(trackers=[tracker])",
    "save": "save_model() writes weights, save_state() a checkpoint; for others, torch.save() on the main process",
    "should_save_model": "every rank calls save_model(), and rank 0 writes",
    "is_fsdp2": "say isinstance(accelerator.strategy, FSDP): FSDP is torch's fully_shard, always",
    "torch_device_mesh": "the mesh of FSDP is that of its fields replicate and shard",
    "register_save_state_pre_hook": "register_for_checkpointing() has objects with a state_dict saved and loaded",
    "register_load_state_pre_hook": "register_for_checkpointing() has objects with a state_dict saved and loaded",
    "clear": "say free_memory()",
    "logging_dir": "say project_dir",
    "save_iteration": "checkpoints are named by the optimizer steps taken",
    "split_batches": _FOUND,
    "dispatch_batches": _FOUND,
    "even_batches": "no sample is trained on twice to make batches even",
    "use_seedable_sampler": "the order of an epoch follows from seed=, always",
    "use_stateful_dataloader": "prepared loaders have a state_dict, always",
    "non_blocking": "batches move without blocking from pinned memory, always",
    "scaler": "backward() scales the loss; optimizer_step_was_skipped tells of an overflow",
    "verify_device_map": "prepare() refuses a dispatched model by itself",
    "lomo_backward": "LOMO is not here; strategy=FSDP(...) needs less memory",
    "fp8_backend": "float8 is not here; mixed_precision is 'no', 'bf16' or 'fp16'",
}
_PARALLEL = "only data are parallel here, with DDP, FSDP and XLA"


def says_it_in_our_words(cls: type[T]) -> type[T]:
    """Have `cls` answer Accelerate's arguments with a `TypeError`, its attributes with an `AttributeError`."""
    for name, words in ARGUMENTS.items():
        setattr(cls, name, answering(getattr(cls, name), words, f"Accelerator.{name}"))

    def missing(self: object, name: str) -> Any:
        words = ATTRIBUTES.get(name, _PARALLEL if name.endswith(("_parallel_rank", "_parallelism_enabled")) else "")
        if words and not hasattr(type(self), name):
            raise AttributeError(f"Accelerator has no attribute {name!r}: {words}.")
        return object.__getattribute__(self, name)  # raises again, also what a property did

    setattr(cls, "__getattr__", missing)  # noqa: B010  # type checkers shall go on without it
    return cls


def answering(function: Callable[P, R], words: Mapping[str, str], name: str) -> Callable[P, R]:
    """Have `function`, called `name`, raise a `TypeError` with the words for an argument that it does not take."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in kwargs:
            if word in words:
                raise TypeError(f"{name}() has no argument {word!r}: {words[word]}.")
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=function.__name__)  # by which the table of a hang calls it
    return functools.wraps(function)(call)
