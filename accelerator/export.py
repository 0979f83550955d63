"""Weights of a prepared model, taken out of it: as a state dict, or as safetensors files that others read."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies import World, collectives
from strategies.errors import StateError
from strategies.shards import whole

from .byte_sizes import number_of_bytes

INDEX = "model.safetensors.index.json"


def state_dict(model: nn.Module, world: World, *, sharded: bool) -> dict[str, Any]:
    """The weights of the user's module: whole on rank 0, in CPU memory, and empty elsewhere; or as they are cut."""
    if sharded:
        return dict(model.state_dict())
    return dict(_gathered(model.state_dict(), world))


def save(model: nn.Module, folder: str | os.PathLike[str], world: World, *, max_shard_size: int | str) -> None:
    """Write the weights as safetensors, with the index that the Hugging Face ecosystem reads where there are several.

    Rank 0 writes, and holds one file of at most `max_shard_size` bytes at a time. Tied weights are written once.
    """
    limit = max(number_of_bytes(max_shard_size, "max_shard_size"), 1)  # at 0, a file for each tensor
    state = _without_ties(model)
    files = _files(state, limit)
    target = Path(folder)
    _on_main(lambda: target.mkdir(parents=True, exist_ok=True), target, world)
    for number, names in enumerate(files, 1):
        part = dict(_gathered({name: state[name] for name in names}, world))
        path = target / _file_name(number, len(files))
        _on_main(functools.partial(_write, part, path), target, world)
        del part
    _on_main(lambda: _finish(target, files, state), target, world)


def _gathered(state: dict[str, Any], world: World) -> Iterator[tuple[str, Any]]:
    """Every value whole, on rank 0 only; one tensor at a time is whole on the others. Collective."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            full = whole(value)
            if world.is_main:
                yield name, full.cpu().clone() if full.device.type == "cpu" else full.cpu()
            del full
        elif world.is_main:
            yield name, value


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, each under the first of its names."""
    first = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    names: dict[str, Tensor] = {}
    seen: set[int] = set()
    keep = model.state_dict(keep_vars=True)
    for name, value in keep.items():
        if isinstance(value, Tensor) and not (id(value) in first and id(value) in seen):
            seen.add(id(value))
            names[name] = value.detach()
    return names


def _files(state: dict[str, Tensor], limit: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if files[-1] and size + num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += num_bytes
    return files


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write(part: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".writing")
    save_file({name: value.contiguous() for name, value in part.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _finish(target: Path, files: Sequence[Sequence[str]], state: dict[str, Tensor]) -> None:
    """Write the index, and remove what an earlier save into this folder left."""
    written = {_file_name(number, len(files)) for number in range(1, len(files) + 1)}
    index = target / INDEX
    if len(files) > 1:
        weight_map = {name: _file_name(number, len(files)) for number, names in enumerate(files, 1) for name in names}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        temporary = index.with_name(index.name + ".writing")
        temporary.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        os.replace(temporary, index)
    else:
        index.unlink(missing_ok=True)
    for path in target.glob("model*.safetensors"):
        if path.name not in written and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name):
            path.unlink()


def _on_main(write: Callable[[], Any], target: Path, world: World) -> None:
    """Have rank 0 call `write`; raise `StateError` on every rank if it could not. Collective."""
    reason = None
    if world.is_main:
        try:
            write()
        except OSError as error:
            reason = str(error)
    reason = collectives.broadcast(reason, world)
    if reason is not None:
        raise StateError(f"save_model could not write to {str(target)!r}: {reason}")
