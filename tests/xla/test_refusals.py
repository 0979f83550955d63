"""What XLA refuses, each by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fresh_process import FreshProcesses

pytestmark = pytest.mark.timeout(300)

# The mode of the process is that of the first case, and lasts to its end.
CASES = {
    "a mesh that does not fit": (
        "Accelerator(XLA(shard='fsdp', mesh=(3, 2)))",
        r"ConfigurationError: mesh is \(3, 2\), for 4 devices; expected two numbers whose product is 4",
    ),
    "float16": (
        "Accelerator('xla', mixed_precision='fp16')",
        "ConfigurationError: mixed_precision is 'fp16', but torch_xla has no loss scaler.*Use mixed_precision='bf16'",
    ),
    "the other mode": (
        "Accelerator(XLA(shard='none'))",
        "LaunchError: XLA asks for one device, but this process already runs every program on all 4",
    ),
    "a model too small to cut": (
        "Accelerator(XLA(shard='fsdp')).prepare(nn.Linear(3, 3))",
        "PrepareError: Linear is too small to be cut over 4 devices: its largest parameter has 9 elements; expected "
        "one of at least 1024.*Use shard='data'",
    ),
    "batch normalisation that counts": (
        "Accelerator('xla').prepare(nn.Sequential(nn.BatchNorm1d(3, momentum=None)))",
        r"PrepareError: 0 is BatchNorm1d\(momentum=None\), which would read a number",
    ),
    "a hook on a parameter": (
        "Accelerator('xla').prepare(hooked)",
        "PrepareError: bias of Linear has hooks, and moving it to torch_xla makes a new parameter without",
    ),
    "a value that is not finite": (
        "accelerator = Accelerator('xla', detect_nonfinite=True)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Threshold(1e30, float('inf')))\n"
        "model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "accelerator.backward(model(torch.ones(4, 64, device=accelerator.device)).mean())\n"
        "optimizer.step()",
        r"NonfiniteError: .* on rank 0 in forward: the output of 1 \(Threshold\) of Sequential",
    ),
    "no blocks to compute again": (
        "Accelerator(XLA(activation_checkpointing=True)).prepare(nn.Linear(3, 3))",
        "PrepareError: activation_checkpointing found no repeated blocks in Linear. Name their classes in",
    ),
    "batches counted twice": (
        "Accelerator(XLA(activation_checkpointing=True)).prepare(nn.Sequential(*map(normed, (3, 3))))",
        "PrepareError: 0.1 is BatchNorm1d, and activation_checkpointing would count its batches twice",
    ),
    "gradients hidden in an object": (
        "hiding(Accelerator(XLA(activation_checkpointing=True, transformer_layer_cls=('Hiding',))))",
        "StepError: Hiding takes a Box with tensors in it, whose gradients activation_checkpointing would lose",
    ),
    "parameters changed after prepare": (
        "changed(lambda model: setattr(model, 'weight', nn.Parameter(model.weight.detach() * 2)))",
        "StepError: weight of Linear is not the parameter that was prepared",
    ),
    "parameters of another dtype after prepare": (
        "changed(lambda model: model.bfloat16(), dtype=torch.bfloat16)",
        "StepError: weight of Linear was prepared as torch.float32 on xla:0 and is torch.bfloat16 on xla:0 now",
    ),
    "a model taken off the device after prepare": (
        "changed(lambda model: model.cpu())",
        "RuntimeError: .*(weight of Linear was prepared as torch.float32 on xla:0 and is torch.float32 on cpu now"
        "|weight of Linear is not the parameter that was prepared)",
    ),
    "inference mode": (
        "evaluated(Accelerator('xla'))",
        "StepError: a batch was taken under torch.inference_mode.., where torch_xla fails .*Use torch.no_grad",
    ),
    "sparse gradients": (
        "Accelerator('xla').prepare(nn.Sequential(nn.Embedding(3, 3, sparse=True)))",
        r"PrepareError: 0 is Embedding\(sparse=True\), and torch_xla has no sparse gradients. Leave out sparse=True",
    ),
    "a GRU without jax": (
        "Accelerator('xla').prepare(nn.GRU(3, 3))",
        "PrepareError: GRU is GRU, which torch_xla runs on several devices through jax, which is not installed",
    ),
    "a model compiled for torch's own compiler": (
        "Accelerator('xla').prepare(torch.compile(nn.Linear(3, 3)))",
        "PrepareError: OptimizedModule is compiled by torch.compile for its default backend, which knows no device",
    ),
    "processes that were asked for": (
        "os.environ['ACCELERATOR_LAUNCH__NPROC_PER_NODE'] = '2'; Accelerator('xla')",
        "LaunchError: launch.nproc_per_node is 2 .*processes asked for: 2, found: 1",
    ),
}
SCRIPT = """
import dataclasses, json, os, sys, torch
from torch import nn
from accelerator import Accelerator
from strategies import XLA

hooked = nn.Linear(3, 3)
hooked.bias.register_hook(print)

def normed(n):
    return nn.Sequential(nn.Linear(n, n), nn.BatchNorm1d(n))

@dataclasses.dataclass
class Box:
    x: torch.Tensor

class Hiding(nn.Linear):
    def forward(self, x, box):
        return super().forward(box.x)

class Outer(nn.Sequential):
    def forward(self, x):
        return self[0](x, Box(x))

def hiding(accelerator):
    model = accelerator.prepare(Outer(Hiding(3, 3)))
    model(torch.zeros(2, 3, device=accelerator.device))

def changed(change, dtype=torch.float32):
    accelerator, net = Accelerator('xla'), nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
    change(model)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.zeros(2, 3, device=accelerator.device, dtype=dtype)).sum())
        optimizer.step()

def evaluated(accelerator):
    with torch.inference_mode():
        next(iter(accelerator.prepare(torch.utils.data.DataLoader([torch.zeros(3)]))))

said = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code)
        said[name] = "nothing was raised"
    except Exception as error:
        said[name] = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scripts = {name: code for name, (code, _) in CASES.items()}
    processes = FreshProcesses(tmp_path_factory.mktemp("refusals"))
    (finished,) = processes(SCRIPT, json.dumps(scripts), timeout=200)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_refused(said: Any, case: str) -> None:
    assert re.search(CASES[case][1], said[case], re.DOTALL), said[case]


def test_a_backward_that_came_before_the_runtime_is_refused(fresh: FreshProcesses) -> None:
    script = "import torch\ntorch.ones(1, requires_grad=True).sum().backward()\n"
    (finished,) = fresh(f"{script}from accelerator import Accelerator\nAccelerator('xla')\n", timeout=200)
    assert finished.returncode == 1
    assert "LaunchError: a backward ran in this process before the runtime of torch_xla was started" in finished.stderr


def test_two_processes_are_refused_before_the_runtime_starts(fresh: FreshProcesses) -> None:
    script = "import sys\nfrom accelerator import Accelerator\ntry:\n    Accelerator('xla')\nfinally:\n    "
    script += "print('torch_xla' in sys.modules)\n"
    for finished in fresh(script, nproc=2):
        assert (
            "LaunchError: XLA drives all devices of a host from one process, but torchrun started 2" in finished.stderr
        )
        assert finished.stdout == "False\n"


NO_DEVICE = {
    None: "LaunchError: XLA found no TPU on this host, and torch_xla would take the CPU instead. Set PJRT_DEVICE=CPU",
    "TPU": "LaunchError: torch_xla finds no device of the kind that PJRT_DEVICE names, 'TPU'; expected TPU, on a host",
    "BOGUS": "LaunchError: torch_xla finds no device of the kind that PJRT_DEVICE names, 'BOGUS'; expected TPU, on a",
}


@pytest.mark.parametrize("asked", list(NO_DEVICE))
def test_hardware_that_is_not_there_is_an_error_and_never_the_cpu(fresh: FreshProcesses, asked: str | None) -> None:
    tries = 2 if asked is None else 1  # torch_xla itself ends a process that asks for a TPU again
    script = f"from accelerator import Accelerator\nfor _ in range({tries}):\n    try:\n        Accelerator('xla')\n"
    script += "    except Exception as error:\n        print(f'{type(error).__name__}: {error}')\n"
    (finished,) = fresh(script, timeout=200, env={"PJRT_DEVICE": asked})
    said = finished.stdout.splitlines()
    assert len(said) == tries
    assert all(line.startswith(NO_DEVICE[asked]) for line in said), finished.stdout + finished.stderr


@pytest.mark.parametrize("asked", [None, "CPU"])
def test_a_cpu_that_torch_xla_chose_before_is_told(fresh: FreshProcesses, asked: str | None) -> None:
    script = "import torch_xla\nfrom accelerator import Accelerator\nprint(Accelerator('xla').device.type)\n"
    (finished,) = fresh(script, timeout=200, env={"PJRT_DEVICE": asked})
    assert finished.stdout == "xla\n", finished.stderr
    assert ("XLA runs on the CPU: PJRT_DEVICE=CPU was set in this process" in finished.stderr) == (asked is None)


def test_the_doctor_names_the_hardware(fresh: FreshProcesses) -> None:
    (finished,) = fresh(["-m", "accelerator", "doctor", "--strategy", "xla"], timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "4 x CPU of torch_xla" in finished.stdout
