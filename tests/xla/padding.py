"""Batches filled up with ghosts under XLA: the numbers of short ones, without a program of their own."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from accelerator import Accelerator
from strategies import XLA
from training import BATCH, STEPS, counts, each_loss, make_data, make_net, make_sgd, weights_of


def padded(strategy: XLA) -> Any:
    """The last batch of three of a window, filled up with ghosts: the numbers of a short one, without its program."""
    return {name: run_padded(strategy, weighed=name == "weighed") for name in ("mean", "weighed")}


def run_padded(strategy: XLA, *, weighed: bool) -> Any:
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS, pad_batches=True)
    net, twin, data = make_net(), make_net(), make_data(4 * STEPS * BATCH - 5)
    model, optimizer, loader = accelerator.prepare(net, make_sgd(net), DataLoader(data, batch_size=BATCH))
    costs, gathered, before = [], [], counts()
    for _ in range(2):
        for x, y, n in loader:
            with accelerator.accumulate(model):
                each = each_loss(model, x, y)
                accelerator.backward(each, weight=n if weighed else None)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                after = counts()
                costs.append((after[0] - before[0], after[1] - before[1]))
                gathered.append(accelerator.gather_for_metrics(each.detach()).cpu())
                before = counts()
    other, (inputs, targets, tokens) = make_sgd(twin), data.tensors
    for _ in range(2):
        for first in range(0, len(inputs), STEPS * BATCH):
            own = slice(first, first + STEPS * BATCH)
            other.zero_grad()
            each, n = each_loss(twin, inputs[own], targets[own]), tokens[own]
            ((each * n).sum() / n.sum() if weighed else each.mean()).backward()
            other.step()
    weights = weights_of(model)
    return {
        "costs": costs,
        "weights": max(float((weights[n] - w).abs().max()) for n, w in weights_of(twin).items()),
        "gathered": [len(values) for values in gathered],
    }
