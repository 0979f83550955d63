"""Host time of one window through the library over that of a loop written by hand, interleaved, as a script.

PJRT_DEVICE=CPU python tests/xla/overhead.py [none|data|fsdp]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from training import BATCH, MODES, STEPS, each_loss, make_data, make_net, make_sgd

ROUNDS = 120


def through_the_library(accelerator: Accelerator) -> Iterator[None]:
    net = make_net()
    loader = DataLoader(make_data(STEPS * BATCH * (ROUNDS + 8)), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(net, make_sgd(net), loader)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(each_loss(model, x, y).mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            yield


def by_hand(accelerator: Accelerator) -> Iterator[None]:
    from strategies.xla import XLAWorld

    world = accelerator._world
    assert isinstance(world, XLAWorld)
    device, layout = world.device, world.layout
    net = make_net().to(device)
    net.again.weight = net.down.weight
    if layout is not None:
        layout.place_parameters(net)
    optimizer = make_sgd(net)
    for number, batch in enumerate(DataLoader(make_data(STEPS * BATCH * (ROUNDS + 8)), batch_size=BATCH), start=1):
        x, y, tokens = (tensor.to(device) for tensor in batch)
        for tensor in (x, y, tokens) if layout is not None else ():
            layout.place_batch(tensor)
        (each_loss(net, x, y).mean() / STEPS).backward()
        if number % STEPS == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            torch_xla.sync()
            yield


def main(mode: str) -> None:
    accelerator = Accelerator(MODES[mode], gradient_accumulation_steps=STEPS)
    loops = {"ours": through_the_library(accelerator), "hand": by_hand(accelerator)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(ROUNDS):
        for name in sorted(loops, reverse=number % 2 == 0):
            xm.wait_device_ops()
            start = time.perf_counter()
            next(loops[name])
            seconds[name].append(time.perf_counter() - start)
    ratios = sorted(ours / hand for ours, hand in zip(*[times[8:] for times in seconds.values()], strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    median = {name: statistics.median(times[8:]) * 1e3 for name, times in seconds.items()}
    print(f"{mode}: a window of {STEPS}: {median['ours']:.2f} ms, by hand {median['hand']:.2f} ms")
    print(f"ratio {quartiles[1]:.3f}, quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] if len(sys.argv) > 1 else "data")
