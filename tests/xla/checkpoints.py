"""Train some steps under a strategy, go on from a checkpoint if there is one, save, and print the losses as JSON."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from accelerator import Accelerator
from strategies import CPU, XLA


class Net(nn.Sequential):
    pass


def main(place: str, folder: str, num_steps: int) -> None:
    strategy = CPU() if place == "cpu" else XLA(shard="fsdp", min_sharded_elements=1)
    accelerator = Accelerator(strategy, project_dir=folder)
    torch.manual_seed(0)
    net = Net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    model, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    accelerator.resume()
    x = torch.linspace(-1, 1, 32).view(8, 4).to(accelerator.device)
    losses = []
    for _ in range(num_steps):
        with accelerator.accumulate(model):
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach().cpu()))
    accelerator.save_state()
    print(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
