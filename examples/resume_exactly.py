"""Stop in the middle of an epoch, go on, and end with the weights of a run that never stopped, bit for bit.

The samples are shuffled and made noisy at random; nothing is skipped, repeated or drawn anew. Expected output:

    stopped after 13 of 24 steps, in epoch 1 after 40 samples
    went on with samples [6, 14, 48, 23, 29, 57, 50, 21]
    the run that never stopped took the same 11 batches: True
    and has the same weights: True
"""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accelerator import Accelerator


class Noisy(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return index, torch.rand(4)


def train(folder, first_step, last_step):
    """Train from one step to another; return the weights and which samples were used."""
    accelerator = Accelerator(strategy="cpu", seed=0, seed_samples=True, project_dir=folder)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if first_step:
        accelerator.resume()
    step, used = first_step, []
    while True:
        for indices, inputs in loader:
            with accelerator.accumulate(model):
                accelerator.backward((model(inputs) - 1).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            used.append(indices.tolist())
            if step == last_step:
                accelerator.save_state()
                return model.state_dict(), used, loader.state_dict()


def main():
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        weights, used, _ = train(whole, 0, 24)
        _, _, place = train(parts, 0, 13)
        print(f"stopped after 13 of 24 steps, in epoch {place['epoch']} after {place['position']} samples")
        resumed, rest, _ = train(parts, 13, 24)
    print(f"went on with samples {rest[0]}")
    print(f"the run that never stopped took the same {len(rest)} batches: {rest == used[13:]}")
    print(f"and has the same weights: {all(torch.equal(weights[name], resumed[name]) for name in weights)}")


if __name__ == "__main__":
    main()
