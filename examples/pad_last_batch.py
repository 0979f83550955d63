"""Give every batch the same length, for hardware that compiles a program for each, and keep the gradient exact.

With `pad_batches=True` a short batch has its first sample again until it is full. `backward` gets one loss for each row
and takes the mean of the samples; `gather_for_metrics` leaves the others out. Expected output:

    42 samples in batches of 8
    lengths that were trained on: 8 8 8 8 8 8
    largest difference of any weight from training on short batches: 0.00000
    losses gathered in an epoch: 42
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

SAMPLES, BATCH = 42, 8


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def make_data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return TensorDataset(x, x.square().sum(1))


def train(accelerator):
    """The weights after an epoch, the lengths of its batches, and how many losses were gathered."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(make_data(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lengths, gathered = [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            losses = (model(x).squeeze(1) - y).square()  # (batch,)
            accelerator.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
        lengths.append(len(x))
        gathered += accelerator.gather_for_metrics(losses.detach()).tolist()
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]), lengths, len(gathered)


def main():
    short, _, _ = train(Accelerator(split_batches=True))
    accelerator = Accelerator(split_batches=True, pad_batches=True)
    padded, lengths, number = train(accelerator)
    accelerator.print(f"{SAMPLES} samples in batches of {BATCH}")
    accelerator.print("lengths that were trained on:", *lengths)
    difference = (padded - short).abs().max()
    accelerator.print(f"largest difference of any weight from training on short batches: {difference:.5f}")
    accelerator.print(f"losses gathered in an epoch: {number}")


if __name__ == "__main__":
    main()
