"""The converter, on whole files: of older releases, and of what has no place here."""

from __future__ import annotations

import pytest
import yaml

from accelerator.configure import convert

MPI_OF_2023 = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
ipex_config: {ipex: true}
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: 29500
mixed_precision: 'no'
mpirun_config: {mpirun_ccl: '1', mpirun_hostfile: /home/user/hostfile}
num_machines: 4
num_processes: 16
rdzv_backend: static
same_network: true
use_cpu: true
"""
MPS_OF_2022 = "distributed_type: MPS\nmixed_precision: 'no'\nnum_processes: 1\nuse_mps_device: true\ncommand: null\n"
FP8 = """
distributed_type: "NO"
mixed_precision: fp8
fp8_config:
  backend: TE
  amax_history_len: 1024
  fp8_format: E4M3
  override_linear_precision: [false, false, false]
"""
MEGATRON = """
distributed_type: MEGATRON_LM
num_processes: 1
megatron_lm_config:
  megatron_lm_recompute_activations: false
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
        (MPS_OF_2022, {"strategy": "single", "launch.nproc_per_node": 1, "mixed_precision": "no"}, []),
        (
            FP8,
            {"strategy": "single"},
            ["mixed_precision", *(f"fp8_config.{name}" for name in yaml.safe_load(FP8)["fp8_config"])],
        ),
        (MEGATRON, {}, ["distributed_type", "megatron_lm_config.megatron_lm_recompute_activations"]),
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
    told = {fate.key for fate in found.fates}
    for key, value in yaml.safe_load(text).items():
        assert {f"{key}.{inner}" for inner in value} <= told if isinstance(value, dict) else key in told
