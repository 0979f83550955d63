"""Four ways to load a model by hand, and this library's, each in a process of its own: what is the peak of memory?

Expected output of `python examples/load_four_ways.py 256`, every weight read once:

    256 MB of weights, float32
    built, then load_state_dict             peak 5.. MB
    meta, then filled tensor by tensor      peak 5.. MB
    meta, then mapped and assigned          peak 2.. MB
    one file per tensor                     peak 2.. MB
    accelerator.bigmodel                    peak 2.. MB
    accelerator.bigmodel, cast to bfloat16  peak 1.. MB
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model

WAYS = [
    "built, then load_state_dict",
    "meta, then filled tensor by tensor",
    "meta, then mapped and assigned",
    "one file per tensor",
    "accelerator.bigmodel",
    "accelerator.bigmodel, cast to bfloat16",
]


def build(megabytes):
    return nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(megabytes // 4)])


def load(way, megabytes, folder):
    if way == "built, then load_state_dict":
        model = build(megabytes)
        model.load_state_dict(torch.load(folder / "model.pth"))
        return model
    with init_empty_weights():
        model = build(megabytes)
    if way == "meta, then filled tensor by tensor":
        model.to_empty(device="cpu")
        state = torch.load(folder / "model.pth", mmap=True)
        for name, weight in model.named_parameters():
            weight.data.copy_(state[name])
    elif way == "meta, then mapped and assigned":
        model.load_state_dict(torch.load(folder / "model.pth", mmap=True), assign=True)
    elif way == "one file per tensor":
        model.to_empty(device="cpu")
        for name, weight in model.named_parameters():
            weight.data.copy_(torch.load(folder / f"{name}.pt"))
    else:
        dtype = torch.bfloat16 if "bfloat16" in way else None
        load_checkpoint_in_model(model, folder / "model.safetensors", dtype=dtype)
    return model


def memory(field):
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1000


def measure(way, megabytes, folder):
    with init_empty_weights():
        build(4)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    model = load(way, megabytes, folder)
    for weight in model.parameters():
        weight.detach().sum()
    print(f"{way:<39} peak {memory('VmHWM') - before:.0f} MB", flush=True)


def write(megabytes, folder):
    state = build(megabytes).state_dict()
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "model.pth")
    for key, weight in state.items():
        torch.save(weight, folder / f"{key}.pt")


def main(megabytes):
    print(f"{megabytes // 4 * 4} MB of weights, float32", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for function, *arguments in [(write,), *[(measure, way) for way in WAYS]]:
            arguments += [megabytes, Path(folder)]
            process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
            process.start()
            process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
