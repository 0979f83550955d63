"""What XLA refuses, each by name, in a process of its own."""

from __future__ import annotations

import re

import pytest

from fresh_process import FreshProcesses

pytestmark = pytest.mark.timeout(300)

CASES = {
    "a backward before": (
        "import torch\ntorch.ones(1, requires_grad=True).sum().backward()\nAccelerator('xla')",
        "LaunchError: a backward ran in this process before the runtime of torch_xla was started",
    ),
    "float16": (
        "Accelerator('xla', mixed_precision='fp16')",
        "ConfigurationError: mixed_precision is 'fp16', but torch_xla has no loss scaler.*Use mixed_precision='bf16'",
    ),
    "the other mode": (
        "Accelerator(XLA()).end_training()\nAccelerator(XLA(shard='none'))",
        "LaunchError: XLA asks for one device, but this process already runs every program on all 4",
    ),
    "a mesh that does not fit": (
        "Accelerator(XLA(shard='fsdp', mesh=(3, 2)))",
        r"ConfigurationError: mesh is \(3, 2\), for 4 devices; expected two numbers whose product is 4",
    ),
    "a model too small to cut": (
        "Accelerator(XLA(shard='fsdp')).prepare(torch.nn.Linear(3, 3))",
        "PrepareError: Linear is too small to be cut over 4 devices: its largest parameter has 9 elements; expected "
        "one of at least 1024.*Use shard='data'",
    ),
    "batch normalisation that counts": (
        "Accelerator('xla').prepare(torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=None)))",
        r"PrepareError: 0 is BatchNorm1d\(momentum=None\), which would read a number",
    ),
    "a hook on a parameter": (
        "model = torch.nn.Linear(3, 3)\nmodel.bias.register_hook(print)\nAccelerator('xla').prepare(model)",
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
    "processes that were asked for": (
        "import os\nos.environ['ACCELERATOR_LAUNCH__NPROC_PER_NODE'] = '2'\nAccelerator('xla')",
        "LaunchError: launch.nproc_per_node is 2 .*2 processes asked for, 1 found",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_refused(fresh: FreshProcesses, case: str) -> None:
    script, words = CASES[case]
    (finished,) = fresh(f"import torch\nfrom accelerator import Accelerator\nfrom strategies import XLA\n{script}\n")
    assert finished.returncode == 1
    assert re.search(words, finished.stderr, re.DOTALL), finished.stderr


def test_two_processes_are_refused_before_the_runtime_starts(fresh: FreshProcesses) -> None:
    script = "import sys\nfrom accelerator import Accelerator\ntry:\n    Accelerator('xla')\nfinally:\n    "
    script += "print('torch_xla' in sys.modules)\n"
    for finished in fresh(script, nproc=2):
        assert (
            "LaunchError: XLA drives all devices of a host from one process, but torchrun started 2" in finished.stderr
        )
        assert finished.stdout == "False\n"
