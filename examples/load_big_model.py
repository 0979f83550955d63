"""A transformer of 2 GB, run with 600 MB of its weights in memory at any time, straight from its checkpoint.

Writes the checkpoint first, one block at a time, and removes it at the end. Expected output of

    python examples/load_big_model.py

    built 2.02 GB of weights on the meta device
    weights    device  10 blocks on the disk, next block read while one computes
    forward 1: ... s
    forward 2: ... s
    peak memory: ... MB above the interpreter

with a peak near 600 MB, and forwards that take as long as with all weights in memory once the file is in the page
cache. `--gigabytes` and `--budget` take other sizes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from accelerator.bigmodel import describe_device_map, init_empty_weights, load_checkpoint_and_dispatch


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def write_checkpoint(folder, width, num_blocks):
    weight_map = {}
    for index in range(num_blocks):
        state = {f"{index}.{name}": weight for name, weight in Block(width).state_dict().items()}
        save_file(state, folder / f"model-{index}.safetensors")
        weight_map |= dict.fromkeys(state, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def memory(field):
    """Bytes of this process's memory, by the kernel's account (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(gigabytes, budget):
    num_blocks = 10
    width = round((gigabytes * 1e9 / num_blocks / 48) ** 0.5 / 8) * 8
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), width, num_blocks)
        with torch.no_grad():
            Block(64)(torch.randn(1, 4, 64))  # what torch takes for itself
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on

        with init_empty_weights():
            model = nn.Sequential(*[Block(width) for _ in range(num_blocks)])
        size = sum(weight.nbytes for weight in model.parameters())
        print(f"built {size / 1e9:.3g} GB of weights on the meta device")
        load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_budget=budget)
        print(describe_device_map(model, {"": "disk"}))

        x = torch.randn(1, 16, width)
        for number in (1, 2, 3):
            start = time.perf_counter()
            with torch.no_grad():
                model(x)
            print(f"forward {number}: {time.perf_counter() - start:.2f} s")
        print(f"peak memory: {(memory('VmHWM') - before) / 1e6:.0f} MB above the interpreter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--budget", default="600MB")
    main(**vars(parser.parse_args()))
