"""Average the weights of a model while it trains, evaluate the average, and write it down.

At a constant learning rate the weights wander around a minimum, and their average lies closer to it. The loop is the
usual one: `EMA` hears of every optimizer step by itself. The same numbers in one process or in several:

    python examples/average_weights.py
    accelerator launch --nproc-per-node 2 --strategy fsdp examples/average_weights.py

Expected output:

    step  32  error of the weights 0.2688  of their average 1.8942
    step  64  error of the weights 0.7052  of their average 0.2402
    step  96  error of the weights 0.4072  of their average 0.1003
    step 128  error of the weights 0.6495  of their average 0.1247
    written: bias (1,), weight (1, 16)
"""

import tempfile

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from accelerator import EMA, Accelerator


def main():
    accelerator = Accelerator(seed=0, split_batches=True)  # 8 is the batch of all processes together
    x = torch.randn(1024, 16)
    truth = torch.randn(16, 1)
    y = x @ truth + 2 * torch.randn(1024, 1)
    model = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMA(accelerator, model, decay=0.95)

    def error():
        """How far the predictions for fresh samples are from those of the truth."""
        with torch.no_grad():
            fresh = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1)).to(accelerator.device)
            return mse_loss(model(fresh), fresh @ truth.to(fresh)).item()

    for step, (inputs, targets) in enumerate(loader, 1):
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        if step % 32 == 0:
            own = error()
            with ema.applied():  # the model has the averaged weights
                averaged = error()
            accelerator.print(f"step {step:3}  error of the weights {own:.4f}  of their average {averaged:.4f}")

    with tempfile.TemporaryDirectory() as folder, ema.applied():
        accelerator.save_model(model, folder)
        if accelerator.is_main_process:
            written = load_file(f"{folder}/model.safetensors").items()
            accelerator.print("written:", ", ".join(f"{name} {tuple(value.shape)}" for name, value in written))


if __name__ == "__main__":
    main()
