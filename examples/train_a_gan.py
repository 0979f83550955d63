"""Train two models in one loop, each with accumulation windows of its own: a GAN learns points on a ring.

Each `accumulate(model)` counts its own micro-batches, so both networks step once every two batches, and neither gets
gradients from the other's loss. Expected output, on one process:

    epoch 10  loss G 0.70  D 1.43  steps G 160  D 160
    ...
    epoch 60  loss G 0.73  D 1.34  steps G 960  D 960
    distance of generated points from the ring: 0.84 before, 0.14 after
"""

import math

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

NUM_EPOCHS = 60


def ring(num_points):
    """Points on a ring of radius 1 and a little beside it: (points, 2)."""
    angle = torch.rand(num_points) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.03 * torch.randn(num_points, 2)


def network(num_inputs, num_outputs):
    return nn.Sequential(nn.Linear(num_inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, num_outputs))


def distance(generator, device):
    with torch.no_grad():
        return (generator(torch.randn(1000, 4, device=device)).norm(dim=1) - 1).abs().mean().item()


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2, split_batches=True, seed=0)
    generator, discriminator = network(4, 2), network(2, 1)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    loader = DataLoader(TensorDataset(ring(2048)), batch_size=64, shuffle=True)
    generator, discriminator, optimizer_g, optimizer_d, loader = accelerator.prepare(
        generator, discriminator, optimizer_g, optimizer_d, loader
    )
    device = accelerator.device
    before = distance(generator, device)
    num_steps = {"G": 0, "D": 0}
    for epoch in range(1, NUM_EPOCHS + 1):
        for (real,) in loader:
            real_label, fake_label = torch.ones(len(real), 1, device=device), torch.zeros(len(real), 1, device=device)
            fake = generator(torch.randn(len(real), 4, device=device)).detach()
            with accelerator.accumulate(discriminator):
                loss_d = cross_entropy(discriminator(real), real_label) + cross_entropy(discriminator(fake), fake_label)
                accelerator.backward(loss_d)
                optimizer_d.step()
                optimizer_d.zero_grad()
                num_steps["D"] += accelerator.sync_gradients
            with accelerator.accumulate(generator):
                loss_g = cross_entropy(discriminator(generator(torch.randn(len(real), 4, device=device))), real_label)
                accelerator.backward(loss_g)
                optimizer_g.step()
                optimizer_g.zero_grad()
                num_steps["G"] += accelerator.sync_gradients
        if epoch % 10 == 0:
            accelerator.print(
                f"epoch {epoch}  loss G {loss_g.item():.2f}  D {loss_d.item():.2f}  "
                f"steps G {num_steps['G']}  D {num_steps['D']}"
            )
    after = distance(generator, device)
    accelerator.print(f"distance of generated points from the ring: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    main()
