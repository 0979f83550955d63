"""Give every batch the same length, for hardware that compiles a program for each, and keep the gradient exact.

`PadBatches` repeats the first sample of a short batch until it is full, and says with weights which rows are samples
and which are ghosts. A mean over all rows would count the ghosts; the weighted one does not. Expected output:

    42 samples in batches of 8: lengths 8 8 8 8 8 8
    largest difference of any weight from training on short batches:
      weighted mean  0.00000
      plain mean     0.06692
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator, PadBatches

SAMPLES, BATCH = 42, 8


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def make_data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return TensorDataset(x, x.square().sum(1))


def train(accelerator, collate=None, mean=lambda each, weights: each.mean()):
    """The weights after two epochs, and the lengths of the batches."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(make_data(), batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lengths = []
    for _ in range(2):
        for batch in loader:
            (x, y), weights = batch if collate else (batch, torch.ones(()))
            with accelerator.accumulate(model):
                each = (model(x).squeeze(1) - y).square()  # (batch,)
                accelerator.backward(mean(each, weights), weight=weights.sum() if collate else None)
                optimizer.step()
                optimizer.zero_grad()
            lengths.append(len(x))
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]), lengths[: len(loader)]


def weighted_mean(each, weights):
    return (each * weights).sum() / weights.sum()


def main():
    accelerator = Accelerator(split_batches=True)
    short, _ = train(accelerator)
    weighted, lengths = train(accelerator, PadBatches(BATCH), weighted_mean)
    plain, _ = train(accelerator, PadBatches(BATCH))
    accelerator.print(f"{SAMPLES} samples in batches of {BATCH}: lengths", *lengths)
    accelerator.print("largest difference of any weight from training on short batches:")
    accelerator.print(f"  weighted mean  {(weighted - short).abs().max():.5f}")
    accelerator.print(f"  plain mean     {(plain - short).abs().max():.5f}")


if __name__ == "__main__":
    main()
