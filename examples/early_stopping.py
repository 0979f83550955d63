"""Stop all processes when one of them wants to stop: `set_trigger` and `check_trigger`.

Each process watches its own losses, and here only the last one finds its loss low enough. Had it left the loop alone,
the others would wait for it. `check_trigger` tells everyone. Expected output of

    accelerator launch --nproc-per-node 2 examples/early_stopping.py

    rank 1 is content after step 10
    rank 0 of 2 stopped after step 10
    rank 1 of 2 stopped after step 10
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator


def main():
    accelerator = Accelerator(seed=0, split_batches=True)
    rank, size = accelerator.process_index, accelerator.num_processes
    x = torch.randn(256, 4)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, (inputs, targets) in enumerate(loader, 1):
        with accelerator.accumulate(model):
            loss = mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if loss.item() < 0.05 and rank == size - 1:
            print(f"rank {rank} is content after step {step}", flush=True)
            accelerator.set_trigger()
        if accelerator.check_trigger():
            break
    accelerator.wait_for_everyone()
    print(f"rank {rank} of {size} stopped after step {step}", flush=True)


if __name__ == "__main__":
    main()
