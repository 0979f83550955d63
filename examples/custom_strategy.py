"""A strategy of one's own: every process has a whole model, and gradients are averaged by hand, without DDP.

Nine methods, most of them one line. The loop below uses it as it would use a built-in one:

    accelerator launch --nproc-per-node 2 examples/custom_strategy.py

and the conformance kit says whether it keeps the promises, from the folder of this file:

    accelerator conformance custom_strategy:AverageByHand --nproc 2

Expected output of the first, the same on any number of processes:

    epoch 0: loss 1.6869
    epoch 1: loss 0.6310
    epoch 2: loss 0.2739
"""

from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from strategies import Strategy
from strategies.process_group import join, leave
from strategies.tree import move


@dataclass(frozen=True)
class AverageByHand(Strategy):
    """Averages the gradients of all parameters in one all-reduce, once per window."""

    timeout_seconds: float = 600.0  # a field is a setting

    def setup(self):
        return join("auto", None, timedelta(seconds=self.timeout_seconds))

    def teardown(self, world):
        leave()

    def wrap(self, model, world, precision):
        model.to(world.device)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)  # ranks may have initialised it differently
        return model

    def unwrap(self, wrapped):
        return wrapped

    def autocast(self, world, precision):
        return torch.autocast(world.device.type, dtype=precision.dtype)

    def no_sync(self, wrapped):
        return nullcontext()  # backward does not communicate

    def reduce_gradients(self, wrapped, world):
        gradients = [p.grad for model in wrapped for p in model.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= world.size  # also of ranks that had nothing left: the loop's weights allow for it
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def discard_gradients(self, wrapped):
        pass  # all there is lies in .grad

    def mark_step(self, world):
        pass  # operations run as they are called

    def device_loader(self, batches, world):
        return (move(batch, world.device) for batch in batches)


def main():
    accelerator = Accelerator(AverageByHand, gradient_accumulation_steps=2, split_batches=True, seed=0)
    x = torch.randn(40, 3)
    dataset = TensorDataset(x, x @ torch.tensor([[1.0], [2.0], [-1.0]]))
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_size=8))
    for epoch in range(3):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x.to(accelerator.device)), dataset.tensors[1].to(accelerator.device))
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
