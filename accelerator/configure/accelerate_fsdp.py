"""The keys of Accelerate's `fsdp_config`: FSDP 1, FSDP 2, and torch_xla's, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .outcome import (
    Document,
    Outcome,
    Rule,
    always,
    becomes,
    choice,
    is_off,
    lost,
    lost_if_asked,
    needless,
    number,
    switch,
    version,
)

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
SHARDINGS = {name: name for name in SHARDING} | {str(number): name for number, name in enumerate(SHARDING, start=1)}


def _version(value: Any, document: Document) -> Outcome:
    version("fsdp_version", value)
    return needless("FSDP 1 and FSDP 2 both become torch's fully_shard, the code of FSDP 2")


def _reshard_after_forward(value: Any, document: Document) -> Outcome:
    """A boolean in FSDP 2; newer files write the strategies of FSDP 1 under this key too."""
    if str(value).upper() == "NO_RESHARD":
        return becomes("fsdp.reshard_after_forward", False)
    if str(value).upper() in SHARDINGS:
        return becomes("fsdp.sharding_strategy", SHARDINGS[str(value).upper()])
    if document.fsdp_version == 1 and "fsdp_sharding_strategy" in document.fsdp:
        return needless("FSDP 1 reads fsdp_sharding_strategy")
    return becomes("fsdp.reshard_after_forward", switch("fsdp_reshard_after_forward", value))


def _sharding_strategy(value: Any, document: Document) -> Outcome:
    if document.fsdp_version == 2:
        return needless("FSDP 2 reads fsdp_reshard_after_forward")
    if str(document.fsdp.get("fsdp_reshard_after_forward", "")).upper() in SHARDINGS:
        return needless("fsdp_reshard_after_forward says it too")
    return becomes("fsdp.sharding_strategy", choice("fsdp_sharding_strategy", value, SHARDINGS))


def _auto_wrap_policy(value: Any, document: Document) -> Outcome:
    names = {"TRANSFORMER_BASED_WRAP": "transformer", "SIZE_BASED_WRAP": "size", "NO_WRAP": "none"}
    policy = "none" if value is None else choice("fsdp_auto_wrap_policy", value, names)
    if policy == "transformer" and not document.fsdp.get("fsdp_transformer_layer_cls_to_wrap"):
        return becomes("fsdp.auto_wrap_policy", "auto", "no classes are named: those that the model declares")
    if policy == "size" and not number("fsdp_min_num_params", document.fsdp.get("fsdp_min_num_params", 100_000_000)):
        return becomes("fsdp.auto_wrap_policy", "none", "with fsdp_min_num_params 0, Accelerate wraps nothing by size")
    if policy == "size" and "fsdp_min_num_params" not in document.fsdp:
        values = {"fsdp.auto_wrap_policy": "size", "fsdp.min_num_params": 100_000_000}
        return Outcome("converted", "with Accelerate's default size", values)
    return becomes("fsdp.auto_wrap_policy", policy)


def _policy_of(document: Document) -> str:
    return str(document.fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")).upper()


def _transformer_layers(value: Any, document: Document) -> Outcome:
    names = value if isinstance(value, list) else [name.strip() for name in str(value or "").split(",")]
    names = [name for name in names if name]
    if not names or _policy_of(document) != "TRANSFORMER_BASED_WRAP":
        return needless("TRANSFORMER_BASED_WRAP alone reads it" if names else "names no class")
    return becomes("fsdp.transformer_layer_cls", tuple(names))


def _min_num_params(value: Any, document: Document) -> Outcome:
    elements = number("fsdp_min_num_params", value)
    if not elements or _policy_of(document) != "SIZE_BASED_WRAP":
        return needless("SIZE_BASED_WRAP alone reads it" if elements else "asks for nothing")
    return becomes("fsdp.min_num_params", elements)


def _backward_prefetch(value: Any, document: Document) -> Outcome:
    modes = {"BACKWARD_PRE": 1, "1": 1, "NO_PREFETCH": 0, "3": 0, "NONE": 0, "BACKWARD_POST": -1, "2": -1}
    blocks = choice("fsdp_backward_prefetch", value, modes)
    if blocks < 0:
        return lost("fully_shard gathers the next block before or not at all; expect the default, 1 block ahead")
    return becomes("fsdp.backward_prefetch", blocks)


def _forward_prefetch(value: Any, document: Document) -> Outcome:
    return becomes("fsdp.forward_prefetch", int(switch("fsdp_forward_prefetch", value)))


def _same(key: str, name: str) -> Rule:
    return lambda value, document: becomes(name, switch(key, value))


def _always_on(key: str, words: str) -> Rule:
    """A switch that is always on here: nothing to write when it is asked for, a loss when it is refused."""
    return lambda value, document: needless(words) if switch(key, value) else lost(f"cannot be switched off: {words}")


FSDP: Mapping[str, Rule] = {
    "fsdp_version": _version,
    "fsdp_sharding_strategy": _sharding_strategy,
    "fsdp_reshard_after_forward": _reshard_after_forward,
    "fsdp_offload_params": _same("fsdp_offload_params", "fsdp.cpu_offload"),
    "fsdp_auto_wrap_policy": _auto_wrap_policy,
    "fsdp_transformer_layer_cls_to_wrap": _transformer_layers,
    "fsdp_min_num_params": _min_num_params,
    "fsdp_backward_prefetch": _backward_prefetch,
    "fsdp_backward_prefetch_policy": _backward_prefetch,
    "fsdp_forward_prefetch": _forward_prefetch,
    "fsdp_state_dict_type": always(
        needless("save_state writes sharded checkpoints, get_state_dict and save_model whole weights")
    ),
    "fsdp_use_orig_params": _always_on("fsdp_use_orig_params", "parameters keep their names and shapes"),
    "fsdp_cpu_ram_efficient_loading": lambda value, document: (
        lost("in code instead: build the model inside accelerator.init_module()")
        if switch("fsdp_cpu_ram_efficient_loading", value)
        else needless("a model built as usual is loaded on every process")
    ),
    "fsdp_sync_module_states": _always_on("fsdp_sync_module_states", "every rank takes rank 0's weights"),
    "fsdp_activation_checkpointing": _same("fsdp_activation_checkpointing", "fsdp.activation_checkpointing"),
    "fsdp_activation_checkpointing_offload": lost_if_asked("inputs of checkpointed blocks stay on the device"),
    "fsdp_ignored_modules": lost_if_asked("name the parameters, with wildcards, in ignored_params of [fsdp]"),
    "fsdp_limit_all_gathers": always(needless("fully_shard always limits them")),
}


def _xla(value: Any, document: Document) -> Outcome:
    if not switch("xla", value):
        return needless("asks for nothing")
    return Outcome("converted", "parameters cut over all devices", {"strategy": "xla", "xla.shard": "fsdp"})


def _xla_dtype(value: Any, document: Document) -> Outcome:
    if str(value) == "float32":
        return needless("the default")
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(str(value))
    if precision is None:
        return lost("expected float32, bfloat16 or float16")
    if str(document.table.get("mixed_precision", precision)) != precision:
        return lost("mixed_precision of the same file says otherwise, and is taken")
    return becomes("mixed_precision", precision)


def _xla_grad_ckpt(value: Any, document: Document) -> Outcome:
    if not switch("xla_fsdp_grad_ckpt", value):
        return needless("asks for nothing")
    return becomes("xla.activation_checkpointing", True)


def _sharding_groups(value: Any, document: Document) -> Outcome:
    """Groups of ranks, each of which holds a copy of the model; a mesh has consecutive ones of equal size."""
    if is_off(value):
        return needless("asks for nothing")
    groups = value if isinstance(value, list) and all(isinstance(group, list) for group in value) else [[]]
    ranks, sizes = [rank for group in groups for rank in group], {len(group) for group in groups}
    if not ranks or len(sizes) > 1 or ranks != [*range(len(ranks))]:
        return lost("expected consecutive ranks in groups of equal size, such as [[0, 1], [2, 3]]")
    return becomes("xla.mesh", (len(groups), len(groups[0])))


XLA: Mapping[str, Rule] = {
    "xla": _xla,
    "xla_fsdp_v2": lost_if_asked("without xla: true it asks for nothing", True),
    "xla_fsdp_grad_ckpt": _xla_grad_ckpt,
}
_COMPILER = always(needless("one program for all devices: the compiler gathers, frees and orders what it needs"))
XLA_SETTINGS: Mapping[str, Rule] = {
    "compute_dtype": _xla_dtype,
    "buffer_dtype": lambda value, document: (
        needless("the default") if is_off(value) or str(value) == "float32" else lost("buffers keep their dtype")
    ),
    "fp32_reduce_scatter": lost_if_asked("gradients are summed in the dtype that the program gives them"),
    "reshard_after_forward": _COMPILER,
    "flatten_parameters": _COMPILER,
    "execute_sharding_on_init": _COMPILER,
    "use_all_gather_via_all_reduce": _COMPILER,
    "mark_step_on_freeing": _COMPILER,
    "optimization_barrier_in_forward": _COMPILER,
    "optimization_barrier_in_backward": _COMPILER,
    "disable_reshard_on_root": _COMPILER,
    "pin_layout_in_collective_ops": _COMPILER,
    "coalesce_all_gather_ops": _COMPILER,
    "coalesce_reduce_scatter_ops": _COMPILER,
    "shard_param_on_dim_0": _COMPILER,
    "all_gather_op": _COMPILER,
    "all_gather_bucket_size_mb": _COMPILER,
    "reduce_scatter_op": _COMPILER,
    "reduce_scatter_bucket_size_mb": _COMPILER,
    "param_init_fn": lost_if_asked("a function in a file cannot be kept; build the model as usual"),
    "sharding_groups": _sharding_groups,
    "sharding_rank": _COMPILER,
    "sharding_world_size": _COMPILER,
    "auto_wrap_policy": always(needless("every parameter is cut by itself; nothing is wrapped")),
    "auto_wrapper_callable": always(needless("every parameter is cut by itself; nothing is wrapped")),
    "transformer_layer_cls_to_wrap": always(needless("every parameter is cut by itself; nothing is wrapped")),
    "min_num_params": always(needless("every parameter is cut by itself; nothing is wrapped")),
}
