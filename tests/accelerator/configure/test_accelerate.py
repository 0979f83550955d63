"""The converter, on files as Accelerate writes them, and against every key that the installed Accelerate knows."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerator.cli import main
from accelerator.config import Resolved, resolve_settings
from accelerator.configure import convert
from accelerator.configure.accelerate import SECTIONS, UNBUILT
from strategies import DDP, ConfigurationError, Strategy
from strategies.fsdp import FSDP
from strategies.single import CPU, SingleDevice
from strategies.xla import XLA

MULTI_CPU = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: true
"""
SINGLE = "distributed_type: NO\nmixed_precision: no\nnum_processes: 1\n"  # unquoted: booleans in YAML
MULTI_GPU = "distributed_type: MULTI_GPU\nmixed_precision: fp16\nnum_processes: 8\ngpu_ids: all\ndynamo_config: {}\n"
MULTI_NODE = """
distributed_type: MULTI_GPU
num_machines: 2
machine_rank: 1
num_processes: 16
main_process_ip: 10.0.0.1
main_process_port: 29555
rdzv_backend: c10d
mixed_precision: 'no'
"""
FSDP_1 = """
distributed_type: FSDP
num_processes: 2
mixed_precision: bf16
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: NO_PREFETCH
  fsdp_cpu_ram_efficient_loading: true
  fsdp_forward_prefetch: true
  fsdp_offload_params: true
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_transformer_layer_cls_to_wrap: BertLayer,BertEmbeddings
  fsdp_use_orig_params: true
use_cpu: true
"""
FSDP_2 = """
distributed_type: FSDP
num_processes: 8
mixed_precision: bf16
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_min_num_params: 2000
  fsdp_reshard_after_forward: false
parallelism_config:
  parallelism_config_dp_replicate_size: 2
  parallelism_config_dp_shard_size: 4
  parallelism_config_tp_size: 1
  parallelism_config_cp_size: 1
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_use_regional_compilation: true
"""
TPU = "distributed_type: XLA\nnum_processes: 8\nmixed_precision: bf16\nmain_training_function: main\n"
TPU_FSDP = """
distributed_type: FSDP
num_processes: 4
fsdp_config:
  xla: true
  xla_fsdp_v2: true
  xla_fsdp_grad_ckpt: true
  xla_fsdp_settings: {compute_dtype: bfloat16, flatten_parameters: true, sharding_groups: [[0, 1], [2, 3]]}
  fsdp_transformer_layer_cls_to_wrap: GPT2Block
"""
DEEPSPEED = """
distributed_type: DEEPSPEED
num_processes: 2
mixed_precision: fp16
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: none
"""


def resolved_from(text: str, folder: Path, *words: str) -> tuple[Resolved, Strategy]:
    """What a converted file really resolves to, and the strategy that it builds."""
    (folder / "theirs.yaml").write_text(text)
    output = folder / "accelerator.toml"
    assert main(["config", "convert", str(folder / "theirs.yaml"), "--output", str(output), *words]) == 0
    resolved = resolve_settings({}, environ={}, directory=folder)
    return resolved, resolved.strategy_for(resolved.settings.strategy)


@pytest.mark.parametrize(
    ("text", "strategy", "precision", "processes"),
    [
        (MULTI_CPU, DDP(device="cpu"), "bf16", 4),
        (SINGLE, SingleDevice(), "no", 1),
        (SINGLE + "use_cpu: true\n", CPU(), "no", 1),
        (MULTI_GPU, DDP(device="cuda"), "fp16", 8),
        (MULTI_NODE, DDP(device="cuda"), "no", 8),
        (
            FSDP_1,
            FSDP(
                device="cpu",
                activation_checkpointing=True,
                auto_wrap_policy="transformer",
                transformer_layer_cls=("BertLayer", "BertEmbeddings"),
                backward_prefetch=0,
                forward_prefetch=1,
                cpu_offload=True,
                sharding_strategy="SHARD_GRAD_OP",
            ),
            "bf16",
            2,
        ),
        (
            FSDP_2,
            FSDP(
                auto_wrap_policy="size",
                min_num_params=2000,
                reshard_after_forward=False,
                replicate=2,
                shard=4,
                compile=True,
            ),
            "bf16",
            8,
        ),
        (TPU, XLA(), "bf16", 1),
        (
            TPU_FSDP,
            XLA(shard="fsdp", mesh=(2, 2), activation_checkpointing=True, transformer_layer_cls=("GPT2Block",)),
            "bf16",
            1,
        ),
    ],
    ids=["multi_cpu", "single", "cpu", "multi_gpu", "multi_node", "fsdp_1", "fsdp_2", "tpu", "tpu_fsdp"],
)
def test_a_converted_file_builds_the_strategy_that_was_asked_for(
    text: str, strategy: Strategy, precision: str, processes: int, tmp_path: Path
) -> None:
    resolved, built = resolved_from(text, tmp_path)
    assert built == strategy
    assert resolved.settings.mixed_precision == precision
    assert resolved.settings.launch.nproc_per_node == processes


def test_several_machines(tmp_path: Path) -> None:
    launch = resolved_from(MULTI_NODE, tmp_path)[0].settings.launch
    assert (launch.nnodes, launch.node_rank, launch.rdzv_backend) == ("2", 1, "c10d")
    assert launch.rdzv_endpoint == "10.0.0.1:29555"


def test_what_has_no_equivalent_is_listed_and_kept_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.yaml").write_text(DEEPSPEED)
    output = tmp_path / "accelerator.toml"
    assert main(["config", "convert", str(tmp_path / "theirs.yaml"), "--output", str(output)]) == 0
    printed, written = capsys.readouterr().out, output.read_text()
    for key in yaml.safe_load(DEEPSPEED)["deepspeed_config"]:
        assert f"deepspeed_config.{key} " in printed
    lost = [
        "distributed_type = 'DEEPSPEED'",
        "deepspeed_config.zero_stage = 3",
        "deepspeed_config.gradient_clipping = 1.0",
    ]
    assert all(f"Without equivalent: {key}: " in written for key in lost)
    assert "3 of 7 keys have no equivalent" in printed
    settings = resolve_settings({}, environ={}, directory=tmp_path).settings
    assert (settings.strategy, settings.gradient_accumulation_steps) == ("auto", 4)


@pytest.mark.parametrize(
    ("key", "value", "setting"),
    [
        ("fsdp_sharding_strategy", 1, {"fsdp.sharding_strategy": "FULL_SHARD"}),
        ("fsdp_sharding_strategy", "HYBRID_SHARD", {"fsdp.sharding_strategy": "HYBRID_SHARD"}),
        ("fsdp_reshard_after_forward", "SHARD_GRAD_OP", {"fsdp.sharding_strategy": "SHARD_GRAD_OP"}),
        ("fsdp_reshard_after_forward", "true", {"fsdp.reshard_after_forward": True}),
        ("reshard_after_forward", "NO_RESHARD", {"fsdp.reshard_after_forward": False}),
        ("fsdp_auto_wrap_policy", "NO_WRAP", {"fsdp.auto_wrap_policy": "none"}),
        ("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", {"fsdp.auto_wrap_policy": "auto"}),
        ("fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", {"fsdp.auto_wrap_policy": "size", "fsdp.min_num_params": 10**8}),
        ("fsdp_min_num_params", 0, {}),
        ("fsdp_backward_prefetch", "BACKWARD_PRE", {"fsdp.backward_prefetch": 1}),
    ],
)
def test_words_of_fsdp(key: str, value: Any, setting: dict[str, object]) -> None:
    text = yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": {key: value}})
    assert dict(convert(text, "x.yaml").values) == {"strategy": "fsdp"} | setting


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fsdp_backward_prefetch", "BACKWARD_POST"),
        ("fsdp_use_orig_params", False),
        ("fsdp_sync_module_states", "false"),
        ("fsdp_cpu_ram_efficient_loading", True),
        ("fsdp_activation_checkpointing_offload", True),
    ],
)
def test_losses_of_fsdp(key: str, value: Any) -> None:
    text = yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": {key: value}})
    assert [fate.key for fate in convert(text, "x.yaml").losses] == [f"fsdp_config.{key}"]


@pytest.mark.parametrize("no", ["false", "no", False, 0, "0"])
def test_switches_in_quotes_are_off_too(no: object) -> None:
    table = {"distributed_type": "FSDP", "fsdp_config": {"xla": no, "fsdp_offload_params": True}}
    assert dict(convert(yaml.safe_dump(table), "x.yaml").values) == {"strategy": "fsdp", "fsdp.cpu_offload": True}
    single = {"distributed_type": "NO", "use_cpu": no}
    assert dict(convert(yaml.safe_dump(single), "x.yaml").values) == {"strategy": "single"}


@pytest.mark.parametrize("groups", [[[0, 2], [1, 3]], [[0, 1], [2]], [[]], 3])
def test_groups_that_are_no_mesh_are_lost(groups: object) -> None:
    table = {"distributed_type": "FSDP", "fsdp_config": {"xla": True, "xla_fsdp_settings": {"sharding_groups": groups}}}
    (lost,) = convert(yaml.safe_dump(table), "x.yaml").losses
    assert lost.key == "fsdp_config.xla_fsdp_settings.sharding_groups"


def test_a_mesh_with_tensor_parallelism_loses_its_shards_too() -> None:
    table = {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
        "parallelism_config": {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 2},
    }
    conversion = convert(yaml.safe_dump(table, sort_keys=False), "x.yaml")
    assert len(conversion.losses) == 2
    assert dict(conversion.values) == {"strategy": "fsdp"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml holds nothing; expected keys and values"),
        ("just words", "x.yaml holds a str"),
        ("- a\n- b", "x.yaml holds a list"),
        ("a: [", "x.yaml is not YAML"),
        (
            "services:\n  web: {}",
            "x.yaml has no distributed_type, which every configuration of Accelerate has; it has ser",
        ),
        ("!!python/object/apply:os.system ['true']", "x.yaml is not YAML"),
        ("distributed_type: MULTI_GPUS", "expected one of NO, MULTI_CPU, .*Did you mean 'MULTI_GPU'"),
        ("distributed_type: NO\nnum_procesess: 1", "num_procesess .* Did you mean 'num_processes'"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_ofload_params: true}", "Did you mean 'fsdp_offload_params'"),
        ("distributed_type: FSDP\nfsdp_config: 3", "fsdp_config is 3"),
        ("distributed_type: FSDP\nfsdp_config: {1: 2}", r"fsdp_config has the key 1 \(x.yaml\); expected words"),
        ("distributed_type: FSDP\nfp8_config: {on: 2}", "fp8_config has the key True"),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: maybe}",
            "fsdp_offload_params is 'maybe'; expected t",
        ),
        ("distributed_type: NO\nnum_processes: 2", "num_processes: 2 and distributed_type: NO"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 3", "the same number of processes on every"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true", "use_cpu: true and distributed_type: MULTI_GPU"),
        ("distributed_type: NO\nmixed_precision: bf61", "mixed_precision is 'bf61'; expected one of no, bf16, fp16"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2.9", "num_processes is 2.9; expected an integer"),
        ("distributed_type: MULTI_GPU\nnum_processes: yes", "num_processes is True; expected an integer"),
        ("distributed_type: NO\nuse_cpu: no\nuse_cpu: yes", r"x.yaml says use_cpu \(line 3\) twice"),
        ("distributed_type: FSDP\nfsdp_config: {version: 1, fsdp_version: 2}", "fsdp_config says fsdp_version twice"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: two}", "fsdp_version is 'two'; expected one of 1, 2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 3}", "fsdp_version is 3; expected one of 1, 2"),
        ("distributed_type: FSDP\nfsdp_config: {xla: maybe}", "xla is 'maybe'; expected true or false"),
        ("distributed_type: MULTI_GPU\nnum_processes: many", "num_processes is 'many'; expected an integer"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        convert(text, "x.yaml")


def test_a_file_that_cannot_be_built_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs.yaml").write_text(
        "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nparallelism_config: {dp_replicate_size: -2}\n"
    )
    output = tmp_path / "accelerator.toml"
    assert main(["config", "convert", str(tmp_path / "theirs.yaml"), "--output", str(output)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yaml"]
    capsys.readouterr()
    assert main(["config", "convert", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err


# --- every key of the installed Accelerate ----------------------------------------------------------------------


def keys_of_accelerate() -> dict[str, set[str]]:
    """Keys by table: `""` is the file's top.

    From its dataclasses, from its launcher's options, and from what its questionnaire writes.
    """
    from accelerate.commands.config import cluster, config_args
    from accelerate.commands.launch import launch_command_parser

    found: dict[str, set[str]] = {name: set() for name in (*SECTIONS, *UNBUILT)}
    found[""] = {field.name for field in dataclasses.fields(config_args.ClusterConfig)}
    options = {action.dest for action in launch_command_parser()._actions}
    for section, prefix in (
        ("fsdp_config", "fsdp_"),
        ("dynamo_config", "dynamo_"),
        ("parallelism_config", "parallelism_config_"),
        ("megatron_lm_config", "megatron_lm_"),
        ("fp8_config", "fp8_"),
        ("deepspeed_config", "deepspeed_"),
        ("deepspeed_config", "zero"),
        ("deepspeed_config", "offload_"),
        ("deepspeed_config", "gradient_"),
    ):
        found[section] |= {name for name in options if name.startswith(prefix)}
    for node in ast.walk(ast.parse(inspect.getsource(cluster))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in found:
            key = node.slice
            prefix = {"dynamo_config": "dynamo_", "parallelism_config": "parallelism_config_"}
            section = ast.unparse(node.value)
            if isinstance(key, ast.Constant):
                found[section].add(str(key.value))
            elif isinstance(key, ast.BinOp) and isinstance(key.right, ast.Constant):
                found[section].add(prefix.get(section, "megatron_lm_") + str(key.right.value))
    return found


def test_every_key_of_accelerate_is_accounted_for() -> None:
    keys = keys_of_accelerate()
    assert len(keys["fsdp_config"]) >= 15  # else the search found nothing
    assert len(keys[""]) >= 30
    table: dict[str, Any] = dict.fromkeys(keys[""])
    table |= {"distributed_type": "FSDP", "num_processes": 2, "num_machines": 2, "machine_rank": 0}
    values = {
        "fsdp_version": 2,
        "fsdp_min_num_params": 0,
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "zero_stage": 3,
        "gradient_accumulation_steps": 1,
    }
    for section, inner in keys.items():
        if section and section not in ("ipex_config", "tp_config"):  # of older releases
            table[section] = {
                key: values.get(key, "NO_WRAP" if key.endswith("policy") else 1 if key.endswith("size") else False)
                for key in sorted(inner)
            }
    conversion = convert(yaml.safe_dump(table), "every.yaml")
    listed = {fate.key for fate in conversion.fates}
    expected = {f"{section}.{key}" for section, inner in keys.items() if section for key in inner}
    expected |= keys[""] - {section for section in keys if keys[section] and section} | {"xla_fsdp_settings"}
    assert listed == expected
    assert all(fate.outcome.values or fate.outcome.words for fate in conversion.fates)


def test_every_key_of_a_sagemaker_configuration_is_accounted_for() -> None:
    from accelerate.commands.config.config_args import SageMakerConfig

    table: dict[str, Any] = {field.name: None for field in dataclasses.fields(SageMakerConfig)}
    table |= {"compute_environment": "AMAZON_SAGEMAKER", "distributed_type": "DATA_PARALLEL", "mixed_precision": "bf16"}
    conversion = convert(yaml.safe_dump(table), "cloud.yaml")
    assert {fate.key for fate in conversion.fates} == table.keys()
    assert dict(conversion.values) == {"mixed_precision": "bf16"}
