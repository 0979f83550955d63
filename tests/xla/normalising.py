"""Normalisations that keep running statistics, which torch_xla computes in its own way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from strategies import XLA
from training import BATCH, each_loss, make_data, make_net, make_sgd, steps


class Normalised(nn.Module):
    """Batch normalisation of vectors and of images, instance normalisation of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.of_images = nn.BatchNorm2d(8)
        self.of_each_image = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.unchanged = nn.InstanceNorm2d(8, momentum=None, track_running_stats=True)  # None is 0 here
        self.linear = nn.Linear(8 * 32, 32)
        self.of_vectors = nn.BatchNorm1d(32, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        images = self.of_images(self.conv(x.reshape(-1, 1, 4, 8)))
        images = torch.tanh(self.of_each_image(images) + self.unchanged(images))
        return self.of_vectors(self.linear(images.flatten(1)))


def normalising(strategy: XLA) -> Any:
    """Statistics after training, and what evaluation makes of them; and those of a sample without a batch."""
    accelerator = Accelerator(strategy)
    net, twin = make_net(Normalised), make_net(Normalised)
    model, optimizer, loader = accelerator.prepare(net, make_sgd(net), DataLoader(make_data(), batch_size=BATCH))
    other, (inputs, targets, _) = make_sgd(twin), make_data().tensors
    for number, _ in enumerate(steps(accelerator, model, optimizer, loader)):
        own = slice(number * BATCH, (number + 1) * BATCH)
        other.zero_grad()
        each_loss(twin, inputs[own], targets[own]).mean().backward()
        other.step()
    found = {
        name: float((buffer.cpu() - dict(twin.named_buffers())[name]).abs().max())
        for name, buffer in model.named_buffers()
    }
    model.eval()
    twin.eval()
    x = make_data().tensors[0]
    with torch.no_grad():
        found["evaluation"] = float((model(x.to(accelerator.device)).cpu() - twin(x)).abs().max())
    copied = copy.deepcopy(model).cpu()
    found["of a copy"] = float((copied(x) - twin(x)).detach().abs().max())
    one, plain = (nn.InstanceNorm1d(4, track_running_stats=True) for _ in range(2))
    sample = x.flatten()[:32].reshape(4, 8)
    accelerator.prepare(nn.Sequential(one, nn.Linear(64, 64)))[0](sample.to(accelerator.device))
    plain(sample)
    found["of a sample"] = float((one.running_var.cpu() - plain.running_var).abs().max())
    return found
