"""Strategies name no device: one that torch learns about at run time, as from TorchTPU, is picked like any other."""

from __future__ import annotations

import json

import pytest
import torch.utils.backend_registration

from fresh_process import FreshProcesses

SCRIPT = """
import json, torch
import torch.distributed as dist
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from strategies import DDP, FSDP, ConfigurationError, Precision
from strategies.single import SingleDevice

class Module:
    def is_available(self): return True
    def is_initialized(self): return True
    def current_device(self): return 0
    def device_count(self): return 1
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed): pass
    def get_amp_supported_dtype(self): return [torch.bfloat16]

_setup_privateuseone_for_python_backend("tpu", backend_module=Module())
def asked(strategy):
    try:
        world = strategy.setup()
    except ConfigurationError as error:
        return str(error)
    Precision("bf16").check(world.device)
    strategy.autocast(world, Precision("bf16"))
    return [str(world.device), world.backend, world.mesh.device_type if world.mesh is not None else None]

without = asked(DDP())
dist.Backend.register_backend("tpu_dist", lambda store, rank, size, timeout: dist.ProcessGroupGloo(
    store, rank, size, timeout), devices=["tpu"])

print(json.dumps([without] + [asked(s) for s in (
    SingleDevice(), SingleDevice("tpu"), SingleDevice("cuda"), DDP(), FSDP(), DDP(device="cpu"))]))
"""


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no device out of Python",
)
def test_a_device_of_another_name_is_picked_with_its_backend(fresh: FreshProcesses) -> None:
    (finished,) = fresh(SCRIPT, nproc=1)
    assert finished.returncode == 0, finished.stderr
    backend = "cpu:gloo,tpu:tpu_dist"
    assert json.loads(finished.stdout.splitlines()[-1]) == [
        "torch has no default backend of collectives for tpu; expected its name, as in backend='nccl'",
        ["tpu:0", None, None],
        ["tpu:0", None, None],
        "device is 'cuda', but this machine has tpu. Use device='auto'.",
        ["tpu:0", backend, None],
        ["tpu:0", backend, "tpu"],
        ["cpu", backend, None],  # the group that was joined first
    ]
