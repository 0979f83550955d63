"""Saving and loading 400 MB on two DDP processes, against `torch.distributed.checkpoint` by itself.

A model of 50 M float32 elements with momentum. Bare: DCP's `save` of the same tensors, flushed to the disk, and
`load`; ours: `save_state` with digests, manifest and rename, `save_state(async_=True)` until it returns, `load_state`.
Wall time of rank 0; before each, outside of it, nothing is being written, the places are empty, and ranks meet.
Run: python tests/benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from interleaved import ratios
from torch import nn

from accelerator import Accelerator
from strategies import DDP

ROUNDS = 11


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

    places = {name: folder / name for name in ("bare", "ours")}

    def settle() -> None:
        accelerator._checkpoints.wait()
        dist.barrier()

    def clear() -> None:
        settle()
        if dist.get_rank() == 0:
            for place in places.values():
                shutil.rmtree(place, ignore_errors=True)
        dist.barrier()

    bare_save = {"bare save": lambda: dcp.save(held, checkpoint_id=places["bare"]) and None}
    ours = {"save_state": lambda: accelerator.save_state(places["ours"]) and None}
    blocked = {"save_state(async_=True)": lambda: accelerator.save_state(places["ours"], async_=True) and None}
    bare_load = {"bare load": lambda: dcp.load(held, checkpoint_id=places["bare"])}
    load = {"load_state": lambda: accelerator.load_state(places["ours"]) and None}
    with contextlib.redirect_stdout(io.StringIO() if dist.get_rank() > 0 else sys.stdout):
        ratios(bare_save | ours, baseline="bare save", rounds=ROUNDS, before=clear)
        ratios(ours | blocked, baseline="save_state", rounds=ROUNDS, before=clear)
        clear()
        for save in (bare_save | ours).values():
            save()
        ratios(bare_load | load, baseline="bare load", rounds=ROUNDS, before=settle)
    accelerator.end_training()


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(Path(sys.argv[-1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [sys.executable, *launch, str(Path(__file__)), "--worker", temporary]
            subprocess.run(command, check=True)
