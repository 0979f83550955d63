"""The other keys of Accelerate's configuration files, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.errors import ConfigurationError

from .outcome import Document, Outcome, Rule, always, becomes, choice, is_off, lost, lost_if_asked, needless, number

DEVICES: Mapping[str, str] = {
    "MULTI_CPU": "cpu",
    "MULTI_GPU": "cuda",
    "MULTI_NPU": "npu",
    "MULTI_MLU": "mlu",
    "MULTI_SDAA": "sdaa",
    "MULTI_MUSA": "musa",
    "MULTI_XPU": "xpu",
    "MULTI_HPU": "hpu",
    "MULTI_NEURON": "neuron",
}
_TENSOR = "tensor, context and sequence parallelism are not built"
_ZERO = (
    'does not run here. strategy = "fsdp" cuts parameters, gradients and optimizer state over processes, as ZeRO stage '
    "3 does; nothing replaces tensor and pipeline parallelism"
)
FOREIGN: Mapping[str, str] = {"DEEPSPEED": f"DeepSpeed {_ZERO}", "MEGATRON_LM": f"Megatron-LM {_ZERO}", "TP": _TENSOR}
"""Kinds that have no strategy here, with the reason. `TP` was one from Accelerate 1.3 to 1.6."""
KINDS = ("NO", *DEVICES, "FSDP", "XLA", "TPU", *FOREIGN, "MPS")


def strategy_for(kind: str, use_cpu: bool) -> str | None:
    """The name of our strategy for a `distributed_type`; `None` where there is none."""
    single = "cpu" if use_cpu else "single"
    return {"NO": single, "MPS": single, "FSDP": "fsdp", "XLA": "xla", "TPU": "xla"}.get(
        kind, "ddp" if kind in DEVICES else None
    )


def _distributed_type(value: Any, document: Document) -> Outcome:
    if document.strategy is None:
        return lost(FOREIGN[document.kind])
    values: dict[str, object] = {"strategy": "xla" if document.is_on_xla else document.strategy}
    if document.kind in DEVICES:
        values["ddp.device"] = DEVICES[document.kind]
    return Outcome("converted", "", values)


def _mixed_precision(value: Any, document: Document) -> Outcome:
    if value is False or value is None:  # `no` without quotes is a boolean in YAML
        return becomes("mixed_precision", "no")
    if str(value).lower() == "fp8":
        return lost("fp8 is not built; bf16 is the nearest")
    precisions = {"no": "no", "bf16": "bf16", "fp16": "fp16"}
    return becomes("mixed_precision", choice("mixed_precision", value, precisions))


def _fp16(value: Any, document: Document) -> Outcome:
    if "mixed_precision" in document.table or is_off(value):
        return needless("mixed_precision says it" if "mixed_precision" in document.table else "asks for nothing")
    return becomes("mixed_precision", "fp16")


def _use_cpu(value: Any, document: Document) -> Outcome:
    if is_off(value) or document.kind in ("NO", "MULTI_CPU"):
        return needless("asks for nothing" if is_off(value) else "the strategy says it")
    if document.kind == "FSDP" and not document.is_on_xla:
        return becomes("fsdp.device", "cpu")
    raise ConfigurationError(
        f"{document.name} says use_cpu: true and distributed_type: {document.kind}; expected one of the two."
    )


def _num_processes(value: Any, document: Document) -> Outcome:
    processes = number("num_processes", value)
    if processes == -1:
        return lost("it says nothing; give accelerator launch --nproc-per-node")
    if document.is_on_xla:
        words = "one process drives all devices of a host, as many as the runtime finds"
        return becomes("launch.nproc_per_node", 1, words)
    if document.kind == "NO" and processes > 1:
        raise ConfigurationError(
            f"{document.name} says num_processes: {processes} and distributed_type: NO; expected one process, or "
            "another distributed_type. Correct it."
        )
    if processes < 1 or processes % document.machines:
        raise ConfigurationError(
            f"{document.name} says num_processes: {processes} and num_machines: {document.machines}; expected the "
            "same number of processes on every machine. Correct it."
        )
    return becomes("launch.nproc_per_node", processes // document.machines)


def _num_machines(value: Any, document: Document) -> Outcome:
    if document.machines == 1:
        return needless("the default")
    if document.is_on_xla:
        return lost("training over several hosts of TPUs is not built")
    return becomes("launch.nnodes", str(document.machines))


def _several(rule: Rule) -> Rule:
    """`rule`, where there are several machines; nothing otherwise."""

    def several(value: Any, document: Document) -> Outcome:
        if document.machines == 1 or document.is_on_xla:
            return needless("one machine meets by itself")
        return needless("asks for nothing") if value is None else rule(value, document)

    return several


def _machine_rank(value: Any, document: Document) -> Outcome:
    rank = number("machine_rank", value)
    return becomes("launch.node_rank", rank, "of this machine: give --node-rank on the others")


def _endpoint(value: Any, document: Document) -> Outcome:
    port = number("main_process_port", document.table.get("main_process_port") or 29500)
    return becomes("launch.rdzv_endpoint", f"{value}:{port}")


def _port(value: Any, document: Document) -> Outcome:
    if document.table.get("main_process_ip"):
        return needless("part of rdzv_endpoint")
    return lost("there is no main_process_ip beside it; give accelerator launch --rdzv-endpoint HOST:PORT")


def _gpu_ids(value: Any, document: Document) -> Outcome:
    if is_off(value) or value == "all":
        return needless("all are seen")
    return lost(f"set CUDA_VISIBLE_DEVICES={value} where you launch")


_POD = lost_if_asked("several hosts of TPUs are not built, and no commands are sent to them")
MACHINE: Mapping[str, Rule] = {
    "compute_environment": always(needless("jobs are started on the machines that are here")),
    "distributed_type": _distributed_type,
    "mixed_precision": _mixed_precision,
    "fp16": _fp16,
    "use_cpu": _use_cpu,
    "use_mps_device": always(needless("the accelerator that the machine has is taken")),
    "debug": always(needless("collectives always compare what the ranks bring")),
    "num_processes": _num_processes,
    "num_machines": _num_machines,
    "machine_rank": _several(_machine_rank),
    "main_process_ip": _several(_endpoint),
    "main_process_port": _several(_port),
    "rdzv_backend": _several(lambda value, document: becomes("launch.rdzv_backend", str(value))),
    "same_network": always(needless("rdzv_endpoint is an address that every machine reaches")),
    "gpu_ids": _gpu_ids,
    "main_training_function": lost_if_asked("the whole script runs in every process", "main"),
    "enable_cpu_affinity": lost_if_asked("processes are not pinned; start them under numactl"),
    "downcast_bf16": lost_if_asked('mixed_precision = "bf16" instead, which keeps parameters in float32'),
    "tpu_name": _POD,
    "tpu_zone": _POD,
    "tpu_use_cluster": _POD,
    "tpu_use_sudo": _POD,
    "command": _POD,
    "command_file": _POD,
    "commands": _POD,
    "tpu_vm": _POD,
    "tpu_env": _POD,
}


def _compile_backend(value: Any, document: Document) -> Outcome:
    if is_off(value):
        return needless("asks for nothing")
    if document.strategy != "fsdp" or document.is_on_xla:
        return lost("call torch.compile(model) in the script, before prepare")
    values = {"fsdp.compile": True, "fsdp.compile_backend": str(value).lower()}
    return Outcome("converted", "each block is compiled", values)


_COMPILE = "torch.compile's own arguments: compile the model in the script, before prepare"
DYNAMO: Mapping[str, Rule] = {
    "dynamo_backend": _compile_backend,
    "dynamo_mode": lost_if_asked(_COMPILE, "default"),
    "dynamo_use_fullgraph": lost_if_asked(_COMPILE),
    "dynamo_use_dynamic": lost_if_asked(_COMPILE),
    "dynamo_use_regional_compilation": lambda value, document: (
        needless("blocks are what fsdp compiles")
        if document.strategy == "fsdp"
        else lost_if_asked(_COMPILE)(value, document)
    ),
}


def _mesh(name: str, setting: str) -> Rule:
    def rule(value: Any, document: Document) -> Outcome:
        size = number(name, value)
        others = [key for key in ("tp_size", "cp_size", "sp_size") if document.parallelism.get(key, 1) not in (1, None)]
        if size == 1:
            return needless("the default")
        if document.strategy != "fsdp" or document.is_on_xla:
            return lost('a mesh belongs to strategy = "fsdp"')
        if others and setting == "fsdp.shard":
            return lost(f"follows from the number of processes here, without {' and '.join(others)}")
        return becomes(setting, size)

    return rule


PARALLELISM: Mapping[str, Rule] = {
    "dp_replicate_size": _mesh("dp_replicate_size", "fsdp.replicate"),
    "dp_shard_size": _mesh("dp_shard_size", "fsdp.shard"),
    "tp_size": lost_if_asked(_TENSOR, 1),
    "cp_size": lost_if_asked(_TENSOR, 1),
    "cp_backend": lost_if_asked(_TENSOR, "torch"),
    "cp_comm_strategy": lost_if_asked(_TENSOR, "allgather"),
    "sp_size": lost_if_asked(_TENSOR, 1),
    "sp_backend": lost_if_asked(_TENSOR, "deepspeed"),
    "sp_seq_length": lost_if_asked(_TENSOR),
    "sp_seq_length_is_variable": lost_if_asked(_TENSOR, True),
    "sp_attn_implementation": lost_if_asked(_TENSOR, "sdpa"),
}


def _accumulation(value: Any, document: Document) -> Outcome:
    if str(value).lower() == "auto":
        return needless("what the script says is taken")
    return becomes("gradient_accumulation_steps", number("gradient_accumulation_steps", value))


_DEEPSPEED = always(lost("DeepSpeed does not run here"))
DEEPSPEED: Mapping[str, Rule] = {
    "gradient_accumulation_steps": _accumulation,
    "gradient_clipping": lost_if_asked("in code instead: accelerator.clip_grad_norm_ before optimizer.step()"),
    "zero_stage": always(lost('strategy = "fsdp" is ZeRO stage 3; with reshard_after_forward = false, stage 2')),
    "offload_optimizer_device": lost_if_asked(
        'strategy = "fsdp" with cpu_offload = true rests all state in CPU memory'
    ),
    "offload_param_device": lost_if_asked('strategy = "fsdp" with cpu_offload = true rests parameters in CPU memory'),
    **dict.fromkeys(
        (
            "deepspeed_config_file",
            "offload_param_nvme_path",
            "offload_optimizer_nvme_path",
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "deepspeed_hostfile",
            "deepspeed_exclusion_filter",
            "deepspeed_inclusion_filter",
            "deepspeed_multinode_launcher",
            "deepspeed_moe_layer_cls_names",
        ),
        _DEEPSPEED,
    ),
}
