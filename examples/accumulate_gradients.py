"""Accumulate gradients over four batches of four: 22 samples make one window of sixteen and a short one of six.

The last window is short, and its last batch too. The gradient is still that of the mean loss over the samples of the
window: the script prints it beside that of one big batch. Expected output, on any number of processes:

    step 1: 16 samples, gradient [-1.3561, -3.0261, -0.2391], of one big batch [-1.3561, -3.0261, -0.2391]
    step 2:  6 samples, gradient [ 0.8488, -2.1744,  3.9332], of one big batch [ 0.8488, -2.1744,  3.9332]
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

BATCH, STEPS = 4, 4


def show(gradient):
    return "[" + ", ".join(f"{value:7.4f}" for value in gradient.flatten().tolist()) + "]"


def main():
    accelerator = Accelerator(gradient_accumulation_steps=STEPS, split_batches=True, seed=0)
    x = torch.randn(22, 3)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]]) + 0.1 * torch.randn(22, 1)
    twin = nn.Linear(3, 1, bias=False)  # trained by hand, on one big batch per step
    model = nn.Linear(3, 1, bias=False)
    model.load_state_dict(twin.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(inputs), targets))
            if accelerator.sync_gradients:  # only to print: clip, step and zero_grad need no `if`
                window = slice(step * BATCH * STEPS, (step + 1) * BATCH * STEPS)
                mse_loss(twin(x[window]), y[window]).backward()
                step += 1
                accelerator.print(
                    f"step {step}: {len(x[window]):2} samples, gradient {show(model.weight.grad)}, "
                    f"of one big batch {show(twin.weight.grad)}"
                )
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            twin.load_state_dict(accelerator.unwrap_model(model).state_dict())
            twin.zero_grad()


if __name__ == "__main__":
    main()
