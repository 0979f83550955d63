"""Host time of one window through the library over that of a loop written by hand, interleaved, as a script.

PJRT_DEVICE=CPU python tests/xla/overhead.py [none|data|fsdp] [rounds] [small|deep]

Times are processor time of the loop's own thread, in which operations are recorded; what the program then takes on the
devices is the same. Each round times a few windows of both, in turns; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from strategies.xla import XLAWorld
from strategies.xla_layout import re_tie, ties_of
from training import BATCH, MODES, STEPS, Net, each_loss, make_data, make_net, make_sgd

WARM_UP = 8


class Deep(nn.Module):
    """Twelve blocks of a transformer without its attention: 72 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


KINDS: dict[str, Callable[[], nn.Module]] = {"small": Net, "deep": Deep}


def through_the_library(accelerator: Accelerator, kind: Callable[[], nn.Module]) -> Iterator[None]:
    net = make_net(kind)
    model, optimizer, loader = accelerator.prepare(net, make_sgd(net), DataLoader(make_data(4096), batch_size=BATCH))
    for _ in itertools.count():
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                accelerator.backward(each_loss(model, x, y).mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield


def by_hand(accelerator: Accelerator, kind: Callable[[], nn.Module]) -> Iterator[None]:
    world = accelerator._world
    assert isinstance(world, XLAWorld)
    device, layout = world.device, world.layout
    net = make_net(kind)
    ties = ties_of(net)
    re_tie(net.to(device), ties)
    if layout is not None:
        layout.place_parameters(net)
    optimizer = make_sgd(net)
    for _ in itertools.count():
        for number, batch in enumerate(DataLoader(make_data(4096), batch_size=BATCH), start=1):
            x, y, tokens = (tensor.to(device) for tensor in batch)
            for tensor in (x, y, tokens) if layout is not None else ():
                xs.mark_sharding(tensor, layout.mesh, (("data", "fsdp"), *[None] * (tensor.ndim - 1)))
            (each_loss(net, x, y).mean() / STEPS).backward()
            if number % STEPS == 0:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                torch_xla.sync()
                yield


def main(mode: str, rounds: int, kind: str) -> None:
    accelerator = Accelerator(MODES[mode], gradient_accumulation_steps=STEPS)
    per_round = 4 if kind == "small" else 1
    loops = {"ours": through_the_library(accelerator, KINDS[kind]), "hand": by_hand(accelerator, KINDS[kind])}
    for loop in loops.values():
        for _ in range(WARM_UP):
            next(loop)
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in sorted(loops, reverse=number % 2 == 0):
            xm.wait_device_ops()
            start = time.thread_time()
            for _ in range(per_round):
                next(loops[name])
            seconds[name].append((time.thread_time() - start) / per_round)
    ratios = sorted(ours / hand for ours, hand in zip(*seconds.values(), strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    median = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    least = min(seconds["ours"]) / min(seconds["hand"])
    print(f"{mode}, {kind}, windows of {STEPS}: {median['ours']:.3f} ms of its thread, {median['hand']:.3f} by hand")
    print(f"ratio {quartiles[1]:.3f}, quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}; of the least {least:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, rounds, kind = [*sys.argv[1:], *("data", "150", "small")[len(sys.argv) - 1 :]]
    main(mode, int(rounds), kind)
