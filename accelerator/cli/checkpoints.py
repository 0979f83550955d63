"""`accelerator checkpoint` and `accelerator export`: what is there, whether it is whole, and its weights."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from accelerator import export as weights
from accelerator.checkpoint import offline
from strategies.errors import StateError


def main(argv: Sequence[str]) -> int:
    """`accelerator checkpoint ls|verify|diff`; the code is 1 if something is broken, or differs."""
    parser = argparse.ArgumentParser(prog="accelerator checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("ls", "a table of what is in a folder"), ("verify", "the same, with every file read")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    compare = commands.add_parser("diff", help="what differs between two checkpoints")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    asked = parser.parse_args(argv)
    if asked.command == "diff":
        lines = offline.differences(asked.first, asked.second)
        print("\n".join(lines) if lines else "no difference")
        return 1 if lines else 0
    return _table(asked.folder, verify=asked.command == "verify")


def export(argv: Sequence[str]) -> int:
    """`accelerator export CHECKPOINT OUT`: the weights of a model as safetensors, on one machine, file by file."""
    parser = argparse.ArgumentParser(prog="accelerator export", description=export.__doc__)
    parser.add_argument("checkpoint", help="a folder that save_state wrote, or its URL of fsspec")
    parser.add_argument("out", help="the folder to write, or a URL of fsspec")
    parser.add_argument("--model", help="which one, where there are several")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file (default: 5GB)")
    asked = parser.parse_args(argv)
    with offline.at(asked.checkpoint) as checkpoint:
        offline.require_whole(checkpoint)
        found = offline.models(checkpoint)
        name = asked.model or next(iter(found), "")
        if name not in found or (asked.model is None and len(found) > 1):
            raise StateError(f"model is {asked.model!r}; expected --model with one of {', '.join(map(repr, found))}")
        sizes = {key: shape.numel() * dtype.itemsize for key, (shape, dtype) in found[name].items()}
        read = offline.reader(checkpoint, name)
        written = weights.write_files(
            sizes, lambda names: {key: read(key) for key in names}, asked.out, asked.max_shard_size
        )
    print(f"{name}: {len(sizes)} tensors in {written} file{'s' if written > 1 else ''} in {asked.out}")
    return 0


def _table(folder: Path, *, verify: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "time", "size", "strategy", "world", "verified", "metrics", box=None)
    broken = []
    for one in offline.summaries(folder, verify=verify):
        body = one.manifest
        broken += [f"{one.name}: {what}" for what in one.wrong]
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in body.get("metrics", {}).items())
        written = datetime.datetime.fromtimestamp(body["time"]).isoformat(" ", "seconds") if body else ""
        table.add_row(
            str(body.get("step", one.name)),
            written,
            f"{one.num_bytes / 1e6:.1f} MB",
            str(body.get("strategy", "")),
            str(body.get("world", {}).get("size", "")),
            "broken" if one.wrong else "yes" if verify else "not read",
            metrics,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    for line in broken:
        console.print(line, markup=False, highlight=False)
    return 1 if broken else 0
