"""Train in bfloat16 and in float16, where a gradient that overflows skips the step of optimizer and scheduler.

Parameters stay float32; the forward pass runs in the lower precision. float16 has a small range, so the loss is scaled
up before backward. The first scale, 65536, is too high here on purpose (targets near 100); every overflow halves it,
until gradients fit. Nothing in the loop is written for it. Expected output:

    no    outputs float32   50 optimizer steps, 0 skipped, scheduler at 50, loss 0.4187
    bf16  outputs bfloat16  50 optimizer steps, 0 skipped, scheduler at 50, loss 1.0749
    fp16  outputs float16   41 optimizer steps, 9 skipped, scheduler at 41, loss 0.9948
"""

import logging

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator


def train(mixed_precision):
    accelerator = Accelerator(mixed_precision=mixed_precision, split_batches=True, seed=0)
    x = torch.randn(160, 8)
    y = 100 * x @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    num_skipped = 0
    for _ in range(5):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                outputs = model(inputs)
                loss = mse_loss(outputs.float(), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                num_skipped += accelerator.optimizer_step_was_skipped
    dtype = str(outputs.dtype).removeprefix("torch.")
    accelerator.print(
        f"{mixed_precision:5} outputs {dtype:9} {50 - num_skipped} optimizer steps, {num_skipped} skipped, "
        f"scheduler at {scheduler.last_epoch}, loss {loss.item():.4f}"
    )


def main():
    logging.getLogger("accelerator").setLevel(logging.ERROR)  # it warns of every skipped step
    for mixed_precision in ("no", "bf16", "fp16"):
        train(mixed_precision)


if __name__ == "__main__":
    main()
