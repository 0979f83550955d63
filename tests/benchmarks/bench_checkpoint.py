"""Saving and loading 400 MB on two DDP processes, against `torch.distributed.checkpoint` by itself.

A model of 50 M float32 elements with momentum. Bare: DCP's `save` of the same tensors, flushed to the disk, and
`load`; ours: `save_state` with digests, manifest and rename, `save_state(async_=True)` until it returns, `load_state`.
Wall time of rank 0, a barrier before each.
Run: python tests/benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from interleaved import ratios
from torch import nn

from accelerator import Accelerator
from strategies import DDP

ROUNDS = 5


def worker(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(DDP(), project_dir=folder)
    net = nn.Sequential(*[nn.Linear(2500, 2500, bias=False) for _ in range(8)])
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))
    accelerator.backward(model(torch.ones(1, 2500)).sum())
    optimizer.step()
    optimizer.zero_grad()
    state = {f"weight/{index}": parameter.detach() for index, parameter in enumerate(net.parameters())}
    momenta = [values["momentum_buffer"] for values in optimizer.state.values()]
    state |= {f"momentum/{index}": value for index, value in enumerate(momenta)}
    held: dict[str, Any] = state

    def bare_save() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "bare", ignore_errors=True)
        dist.barrier()
        dcp.save(held, checkpoint_id=folder / "bare")

    arms = {
        "bare save": bare_save,
        "save_state": lambda: accelerator.save_state(keep_last=1) and None,
    }
    with contextlib.redirect_stdout(io.StringIO() if dist.get_rank() > 0 else sys.stdout):
        ratios({name: together(run) for name, run in arms.items()}, baseline="bare save", rounds=ROUNDS)
        loads = {
            "bare load": lambda: dcp.load(held, checkpoint_id=folder / "bare"),
            "load_state": lambda: accelerator.load_state() and None,
        }
        ratios({name: together(run) for name, run in loads.items()}, baseline="bare load", rounds=ROUNDS)

        def blocked() -> None:
            accelerator.save_state(async_=True)

        waiting = {"save_state": arms["save_state"], "save_state(async_=True)": blocked}
        settled = {name: together(run, accelerator._checkpoints.wait) for name, run in waiting.items()}
        ratios(settled, baseline="save_state", rounds=ROUNDS)
    accelerator.end_training()


def together(run: Callable[[], Any], before: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def run_together() -> None:
        run()

    def settled() -> None:
        before()
        dist.barrier()
        run_together()

    return settled


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(Path(sys.argv[-1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [sys.executable, *launch, str(Path(__file__)), "--worker", temporary]
            subprocess.run(command, check=True)
