"""The converter, on whole files: of older releases, and of what has no place here."""

from __future__ import annotations

import pytest
import yaml

from accelerator.configure import convert

PLAIN = """
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
"""
MPI_OF_2023 = f"""{PLAIN}
distributed_type: MULTI_CPU
ipex_config: {{ipex: true}}
main_process_ip: 10.1.0.1
main_process_port: 29501
mixed_precision: 'no'
mpirun_config: {{mpirun_ccl: '2', mpirun_hostfile: hosts.txt}}
num_machines: 4
num_processes: 16
use_cpu: true
"""
ANSWERED_NO = "distributed_type: MULTI_CPU\nipex_config: {ipex: false}\nnum_processes: 2\n"
MPS_OF_2022 = "distributed_type: MPS\nmixed_precision: 'no'\nnum_processes: 1\nuse_mps_device: true\ncommand: null\n"
FP8 = f"""{PLAIN}
distributed_type: MULTI_GPU
gpu_ids: all
num_machines: 1
num_processes: 2
mixed_precision: fp8
use_cpu: false
fp8_config:
  backend: TE
  amax_compute_algo: max
  amax_history_len: 512
  fp8_format: E4M3
  interval: 1
  margin: 0
  override_linear_precision: (false, false, false)
  use_autocast_during_eval: false
"""
MEGATRON = f"""{PLAIN}
distributed_type: MEGATRON_LM
num_processes: 8
megatron_lm_config:
  megatron_lm_gradient_clipping: 1.0
  megatron_lm_num_micro_batches: 2
  megatron_lm_pp_degree: 2
  megatron_lm_recompute_activations: true
  megatron_lm_sequence_parallelism: true
  megatron_lm_tp_degree: 2
  megatron_lm_use_distributed_optimizer: true
"""
TENSOR_OF_2025 = "distributed_type: TP\nmixed_precision: bf16\nnum_processes: 4\ntp_config: {tp_size: 4}\n"
ANOTHER_KINDS_TABLES = """
distributed_type: 'NO'
debug: true
num_processes: 1
fsdp_config: {fsdp_sync_module_states: false}
deepspeed_config: {deepspeed_config_file: zero.json, gradient_accumulation_steps: 4}
megatron_lm_config: {megatron_lm_tp_degree: 2}
"""
CLOUD = """
compute_environment: AMAZON_SAGEMAKER
debug: false
distributed_type: NO
ec2_instance_type: large
iam_role_name: trainer
mixed_precision: fp16
use_cpu: false
"""
QUESTIONNAIRE_OF_DEEPSPEED = f"""{PLAIN}
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 2
num_processes: 16
main_process_ip: 10.1.0.1
main_process_port: 29501
deepspeed_config:
  deepspeed_exclusion_filter: worker-1:0
  deepspeed_hostfile: hosts.txt
  deepspeed_inclusion_filter: worker-2:1
  deepspeed_moe_layer_cls_names: Experts
  deepspeed_multinode_launcher: pdsh
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: nvme
  offload_optimizer_nvme_path: /nvme
  offload_param_device: cpu
  offload_param_nvme_path: /nvme
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
"""
TENSOR = """
distributed_type: FSDP
mixed_precision: bf16
num_processes: 8
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
parallelism_config:
  parallelism_config_cp_size: 2
  parallelism_config_dp_replicate_size: 1
  parallelism_config_dp_shard_size: 2
  parallelism_config_tp_size: 2
"""
DEEPSPEED_FILE = """
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: zero_stage1_config.json
  zero3_init_flag: false
num_processes: 2
"""


@pytest.mark.parametrize(
    ("text", "values", "lost"),
    [
        (
            MPI_OF_2023,
            {"strategy": "ddp", "ddp.device": "cpu", "launch.nnodes": "4", "launch.nproc_per_node": 4},
            ["ipex_config.ipex", "mpirun_config.mpirun_ccl", "mpirun_config.mpirun_hostfile"],
        ),
        (ANSWERED_NO, {"strategy": "ddp", "ddp.device": "cpu", "launch.nproc_per_node": 2}, []),
        (MPS_OF_2022, {"strategy": "single", "launch.nproc_per_node": 1, "mixed_precision": "no"}, []),
        (
            FP8,
            {"strategy": "ddp", "ddp.device": "cuda"},
            ["mixed_precision", *(f"fp8_config.{name}" for name in yaml.safe_load(FP8)["fp8_config"])],
        ),
        (
            MEGATRON,
            {"launch.nproc_per_node": 8},
            [
                "distributed_type",
                *(f"megatron_lm_config.{name}" for name in yaml.safe_load(MEGATRON)["megatron_lm_config"]),
            ],
        ),
        (
            TENSOR_OF_2025,
            {"mixed_precision": "bf16", "launch.nproc_per_node": 4},
            ["distributed_type", "tp_config.tp_size"],
        ),
        (ANOTHER_KINDS_TABLES, {"strategy": "single", "launch.nproc_per_node": 1}, []),
        (CLOUD, {"mixed_precision": "fp16"}, [name for name in yaml.safe_load(CLOUD) if name != "mixed_precision"]),
        (
            QUESTIONNAIRE_OF_DEEPSPEED,
            {"launch.nproc_per_node": 8, "launch.nnodes": "2", "gradient_accumulation_steps": 4},
            ["distributed_type"]
            + [
                f"deepspeed_config.{name}"
                for name in yaml.safe_load(QUESTIONNAIRE_OF_DEEPSPEED)["deepspeed_config"]
                if name != "gradient_accumulation_steps"
            ],
        ),
        (
            TENSOR,
            {"strategy": "fsdp", "launch.nproc_per_node": 8},
            [f"parallelism_config.parallelism_config_{name}_size" for name in ("cp", "dp_shard", "tp")],
        ),
        (
            "distributed_type: MULTI_XPU\nmixed_precision: bf16\nnum_processes: 2\n",
            {"strategy": "ddp", "ddp.device": "xpu", "mixed_precision": "bf16", "launch.nproc_per_node": 2},
            [],
        ),
        (
            DEEPSPEED_FILE,
            {"launch.nproc_per_node": 2},
            ["distributed_type", "deepspeed_config.deepspeed_config_file", "deepspeed_config.zero3_init_flag"],
        ),
    ],
)
def test_whole_files_say_what_is_kept_and_what_is_lost(text: str, values: dict[str, object], lost: list[str]) -> None:
    found = convert(text, "theirs.yaml")
    assert values.items() <= found.values.items()
    assert [fate.key for fate in found.losses] == lost
    assert ("gradient_accumulation_steps" in found.values) == ("gradient_accumulation_steps" in values)
    told = {fate.key for fate in found.fates}
    for key, value in yaml.safe_load(text).items():
        assert {f"{key}.{inner}" for inner in value} <= told if isinstance(value, dict) else key in told
