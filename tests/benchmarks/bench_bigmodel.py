"""What loading and running big models costs in time and memory, beside doing it by hand and beside Accelerate.

Every measurement is a process of its own; ways take turns, and medians are printed. Memory is the kernel's peak of the
resident set (VmHWM) above the interpreter with all imports; mapped pages count. Needs 6 GB of disk in the folder for
temporary files. Run: python tests/benchmarks/bench_bigmodel.py [load|second|run|warm|overhead|map] [rounds]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import ratios
from torch import Tensor, nn

WIDTH, TOKENS, GB = 2048, 16, 10**9


class Block(nn.Module):
    """A block of a transformer of 201 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (16, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def build(num_blocks: int) -> nn.Module:
    return nn.Sequential(*[Block() for _ in range(num_blocks)])


def write(folder: Path, num_blocks: int, *, torch_files: bool) -> None:
    """One safetensors file per block with an index, and the same as one file of torch.save and one per tensor."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    state, weight_map = {}, {}
    for index in range(num_blocks):
        part = {f"{index}.{name}": value * 0.3 for name, value in Block().state_dict().items()}
        save_file(part, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"{index}.safetensors")
        state |= part if torch_files else {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if torch_files:
        torch.save(state, folder / "all.pth")
        (folder / "each").mkdir()
        for name, value in state.items():
            torch.save(value, folder / "each" / f"{name}.pt")


# -- in the measured process -------------------------------------------------------------------------------


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def read_alone(folder: Path) -> float:
    start = time.perf_counter()
    piece = bytearray(2**24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while file.readinto(piece):
                pass
    return time.perf_counter() - start


def by_hand(model: nn.Module, folder: Path, way: str) -> nn.Module:
    from safetensors.torch import load_file

    if way == "torch.load, load_state_dict":
        model = build(len(model))  # type: ignore[arg-type]
        model.load_state_dict(torch.load(folder / "all.pth"))
    elif way == "meta, to_empty, one tensor at a time":
        model.to_empty(device="cpu")
        state = torch.load(folder / "all.pth", mmap=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
    elif way == "meta, torch.load(mmap), assign":
        model.load_state_dict(torch.load(folder / "all.pth", mmap=True), assign=True)
    elif way == "meta, safetensors, assign":
        state = {}
        for path in folder.glob("*.safetensors"):
            state |= load_file(path)
        model.load_state_dict(state, assign=True)
    elif way == "to_empty, one file per tensor":
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.load(folder / "each" / f"{name}.pt"))
    return model


def load(way: str, folder: Path) -> Callable[[], nn.Module]:
    num_blocks = len(list(folder.glob("*.safetensors")))
    if way.startswith("Accelerate"):
        import accelerate

        with accelerate.init_empty_weights():
            model = build(num_blocks)
        return lambda: accelerate.load_checkpoint_in_model(model, str(folder), {"": "cpu"}) or model
    from accelerator import bigmodel

    with bigmodel.init_empty_weights():
        model = build(num_blocks)
    if way.startswith("ours"):
        return lambda: bigmodel.load_checkpoint_in_model(model, folder, mmap="copied" not in way) and model
    return lambda: by_hand(model, folder, way)


def run(way: str, folder: Path) -> Callable[[], nn.Module]:
    if way == "in memory":
        return load("ours, copied", folder)
    num_blocks = len(list(folder.glob("*.safetensors")))
    if way.startswith("Accelerate"):
        import accelerate

        with accelerate.init_empty_weights():
            model = build(num_blocks)
        places = {str(index): "disk" for index in range(num_blocks)}
        # Accelerate wants something on a device that computes, and so has the first block in memory.
        places["0"] = "cpu"
        rewritten = folder / "rewritten"
        return lambda: accelerate.load_checkpoint_and_dispatch(
            model, str(folder), places, offload_folder=str(rewritten)
        )
    from accelerator import bigmodel

    with bigmodel.init_empty_weights():
        model = build(num_blocks)
    budget = way.split()[-1]
    return lambda: bigmodel.load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_budget=budget)


def worker(kind: str, way: str, folder: Path) -> dict[str, Any]:
    """Measure one way, in this process."""
    torch.set_num_threads(1)  # two on a shared machine wait for each other
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, WIDTH)
    with torch.no_grad():
        Block()(x)
    if way == "reading the files alone":
        drop_from_cache(folder)
        return {"cold": read_alone(folder)}
    prepared = (load if kind == "load" else run)(way, folder)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start, spent = time.perf_counter(), time.process_time()
    model = prepared()
    found: dict[str, Any] = {"load": time.perf_counter() - start}
    if kind == "load":
        found["load, processor"] = time.process_time() - spent
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sum()
        found |= {"load and read": time.perf_counter() - start, "both, processor": time.process_time() - spent}
    with torch.no_grad():
        times = []
        for _ in range(4):
            start = time.perf_counter()
            y = model(x)
            times.append(time.perf_counter() - start)
        found |= {"first": times[0], "warm": statistics.median(times[1:]), "peak": memory("VmHWM") - before}
        if kind == "run" and way != "in memory":
            drop_from_cache(folder)
            start = time.perf_counter()
            model(x)
            found["cold"] = time.perf_counter() - start
    found["sum"] = y.double().sum().item()
    return found


# -- the parent --------------------------------------------------------------------------------------------


def compare(kind: str, ways: list[str], folder: Path, rounds: int) -> None:
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for index in range(rounds):
        for way in ways if index % 2 == 0 else reversed(ways):
            words = [sys.executable, __file__, "worker", "--kind", kind, "--way", way, "--folder", str(folder)]
            finished = subprocess.run(words, capture_output=True, text=True, check=False)
            if finished.returncode:
                raise SystemExit(f"{way}: {finished.stderr}")
            results[way].append(json.loads(finished.stdout.splitlines()[-1]))
    sums = {one["sum"] for found in results.values() for one in found if "sum" in one}
    assert max(sums) - min(sums) <= 1e-4 * max(map(abs, sums)), sums
    for way, found in results.items():
        columns = [key for key in found[0] if key != "sum"]
        row = {key: statistics.median(one[key] for one in found) for key in columns}
        words = [
            f"{key} {value / 1e6:.0f} MB" if key == "peak" else f"{key} {value:.3f} s" for key, value in row.items()
        ]
        print(f"  {way + ':':38}", ", ".join(words))
    by_hand = [way for way in ways if way.startswith(("meta", "torch", "to_empty"))]
    for key in ("load", "load, processor", "load and read", "both, processor") if by_hand else ():
        fastest = min(by_hand, key=lambda way: statistics.median(one[key] for one in results[way]))
        for way in ways:
            if way not in by_hand:
                pairs = [one[key] / base[key] for one, base in zip(results[way], results[fastest], strict=True)]
                print(f"  {key}, {way} / {fastest}: {statistics.median(pairs):.2f}")
    base = results.get("in memory")
    for way, found in results.items() if base else ():
        if "warm" in found[0]:
            pairs = [one["warm"] / two["warm"] for one, two in zip(found, base or [], strict=True)]
            print(f"  warm, {way} / in memory: {statistics.median(pairs):.2f}")


def forward_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            model(x)

    return once


def warm(folder: Path, rounds: int) -> None:
    """Forwards that take turns in one process, all weights in memory or in the page cache."""
    torch.set_num_threads(1)
    x = torch.randn(1, TOKENS, WIDTH)
    models = {way: run(way, folder)() for way in ("in memory", "ours within 512MB", "Accelerate")}

    arms = {way: forward_of(model, x) for way, model in models.items()}
    for words, clock in (("wall time", time.perf_counter), ("processor time of all threads", time.process_time)):
        print(f"  {words}")
        ratios(arms, baseline="in memory", rounds=rounds, clock=clock)


def second(folder: Path, rounds: int) -> None:
    """Forwards after the first, that take turns in one process: loaded models over one built in the ordinary way."""
    torch.set_num_threads(1)
    x = torch.randn(1, TOKENS, WIDTH)
    ways = {"built": "torch.load, load_state_dict", "ours, mapped": "ours, mapped", "ours, copied": "ours, copied"}
    models = {name: load(way, folder)() for name, way in ways.items()}
    for name, model in models.items():
        print(f"  {name}: weights begin at {sorted({w.data_ptr() % 64 for w in model.parameters()})} modulo 64 bytes")
    arms = {name: forward_of(model, x) for name, model in models.items()}
    for words, clock in (("wall time", time.perf_counter), ("processor time", time.process_time)):
        print(f"  {words}")
        ratios(arms, baseline="built", rounds=rounds, clock=clock)


def overhead() -> None:
    """Microseconds that dispatching adds to a block whose weights are in memory already."""
    import accelerate

    from accelerator import bigmodel

    def net() -> nn.Module:
        return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(200)])

    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "plain": net(),
            "ours, cpu_offload": bigmodel.cpu_offload(net(), "cpu"),
            "ours, disk_offload, all within the budget": bigmodel.disk_offload(
                net(), folder, "cpu", offload_budget="1GB"
            ),
            "Accelerate, cpu_offload": accelerate.cpu_offload(net(), torch.device("cpu")),
        }
        x, times = torch.randn(1, 8), {name: [] for name in arms}
        with torch.no_grad():
            for _ in range(30):
                for name, model in arms.items():
                    start = time.thread_time()
                    model(x)
                    times[name].append(time.thread_time() - start)
        for name in list(arms)[1:]:
            more = statistics.median(one - base for one, base in zip(times[name], times["plain"], strict=True))
            print(f"  {name}: {more / 200 * 1e6:.1f} us a block")


def device_map() -> None:
    """Seconds for a map of 10,000 modules over four devices, memory and disk."""
    from accelerator import bigmodel

    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(10_000)])
    for kind in ("balanced", "sequential"):
        for room in ("100MB", "10MB"):
            start = time.thread_time()
            found = bigmodel.infer_auto_device_map(model, {0: room, 1: room, 2: room, "cpu": "50MB"}, kind=kind)
            seconds = time.thread_time() - start
            print(f"  {kind}, {room} each: {seconds:.3f} s of processor time, {len(set(found.values()))} devices")


def main(what: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        if what in ("load", "all"):
            print("loading 1 GB in 5 blocks")
            write(Path(temporary) / "load", 5, torch_files=True)
            hand = [
                "torch.load, load_state_dict",
                "meta, to_empty, one tensor at a time",
                "meta, torch.load(mmap), assign",
                "meta, safetensors, assign",
                "to_empty, one file per tensor",
            ]
            compare("load", [*hand, "ours, mapped", "ours, copied", "Accelerate"], Path(temporary) / "load", rounds)
        if what in ("second", "all"):
            print("forwards after the first, 1 GB in 5 blocks")
            write(Path(temporary) / "second", 5, torch_files=True)
            second(Path(temporary) / "second", 4 * rounds)
        if what in ("run", "all"):
            print("running 2 GB in 10 blocks from the disk")
            write(Path(temporary) / "run", 10, torch_files=False)
            ways = ["in memory", "ours within 512MB", "Accelerate", "reading the files alone"]
            compare("run", ways, Path(temporary) / "run", rounds)
        if what in ("warm", "all"):
            print("running 1 GB in 5 blocks from the page cache")
            write(Path(temporary) / "warm", 5, torch_files=False)
            warm(Path(temporary) / "warm", 2 * rounds)
    if what in ("overhead", "all"):
        print("what dispatching adds to 200 blocks whose weights are in memory, thread time")
        overhead()
    if what in ("map", "all"):
        print("infer_auto_device_map, 10,000 modules")
        device_map()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", "load", "run", "warm", "second", "overhead", "map", "worker"]
    )
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--kind")
    parser.add_argument("--way")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.what == "worker":
        print(json.dumps(worker(asked.kind, asked.way, asked.folder)))
    else:
        main(asked.what, asked.rounds)
