"""Train under some strategies, save, and go on under others, as a script: prints how far each ends from the rest.

`python checkpoints.py FOLDER write data cpu ...` trains two windows and a part of the next under each and saves, and
two epochs without a break. `python checkpoints.py FOLDER read fsdp ...` goes on from every checkpoint under each, to
the end of the second epoch. With `write+read`, one after the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from strategies import CPU, DDP, FSDP
from training import BATCH, LENGTH, MODES, STEPS, Net, make_data, make_net, make_schedule, shapes_on_devices, steps

STRATEGIES = {"cpu": CPU(), "ddp": DDP(device="cpu"), "fsdp2": FSDP(device="cpu"), **MODES}
PER_EPOCH = -(-LENGTH // BATCH)
SAVED_AFTER = 2 * STEPS + 1  # micro-batches: inside the third window


class Dropping(Net):
    """Draws random numbers in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)


def train(name: str, folder: Path, num_batches: int, *, save: bool = False, kind: Any = Net, seed: Any = None) -> Any:
    """Losses of batches, from the checkpoint in `folder` if there is one; and whether state is cut before a step."""
    accelerator = Accelerator(
        STRATEGIES[name], project_dir=folder, gradient_accumulation_steps=STEPS, split_batches=True, seed=seed
    )
    net = make_net(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True, generator=order)
    model, optimizer, schedule, loader = accelerator.prepare(net, optimizer, make_schedule(optimizer), loader)
    resumed = accelerator.resume() is not None
    as_cut = name not in MODES or not resumed or is_cut_alike(shapes_on_devices(model, optimizer))
    losses: list[Any] = []
    while len(losses) < num_batches:
        for each in steps(accelerator, model, optimizer, loader, schedule):
            losses.append(accelerator.gather_for_metrics(each))
            if len(losses) == num_batches:
                break
    if save:
        accelerator.save_state(async_=kind is Dropping)
    accelerator.end_training()
    return [float(each.mean()) for each in losses], as_cut


def dropping(name: str, folder: Path) -> Any:
    """Losses of a run that draws random numbers, and of one that is stopped inside a window and goes on."""
    whole, _ = train(name, folder / "whole", 2 * PER_EPOCH, kind=Dropping, seed=1)
    first, _ = train(name, folder / "parts", SAVED_AFTER, save=True, kind=Dropping, seed=1)
    rest, _ = train(name, folder / "parts", 2 * PER_EPOCH - SAVED_AFTER, kind=Dropping, seed=1)
    return whole, first + rest


def is_cut_alike(shapes: dict[str, Any]) -> bool:
    names = [name for name in shapes if f"momentum of {name}" in shapes]
    return bool(names) and all(shapes[name] == shapes[f"momentum of {name}"] for name in names)


def main(folder: Path, tasks: str, *names: str) -> None:
    found: dict[str, Any] = {}
    for name in names if "write" in tasks else ():
        found[name] = train(name, folder / name, SAVED_AFTER, save=True)
        found[f"whole {name}"] = train(name, folder / f"whole {name}", 2 * PER_EPOCH)
    for name in names if "read" in tasks else ():
        writers = sorted(path.name for path in folder.iterdir() if (path / "checkpoints").exists())
        for writer in [one for one in writers if name in MODES or one in MODES]:
            found[f"{writer} to {name}"] = train(name, folder / writer, 2 * PER_EPOCH - SAVED_AFTER)
    if "write" in tasks and "data" in names:
        found["dropping"] = dropping("data", folder / "dropping")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
