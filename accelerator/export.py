"""Weights of a prepared model, taken out of it: as a state dict, or as safetensors files that others read."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies import World, collectives
from strategies.errors import StateError, listed
from strategies.shards import copy_whole, whole

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
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    files = _files(sizes, limit)
    target = Path(folder)
    _on_main(lambda: target.mkdir(parents=True, exist_ok=True), target, world)
    for number, names in enumerate(files, 1):
        part = dict(_gathered({name: state[name] for name in names}, world))
        path = target / _file_name(number, len(files))
        _on_main(functools.partial(_write, part, path), target, world)
        del part
    _on_main(lambda: _finish(target, files, sum(sizes.values())), target, world)


def write_files(
    sizes: Mapping[str, int],
    read: Callable[[list[str]], dict[str, Tensor]],
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
) -> int:
    """Write tensors of these sizes in bytes, of which `read` gives some at a time; return the number of files.

    One process calls it, and holds one file at a time. `folder` may be a URL of `fsspec`: each file then goes there
    when it is whole, the index last.
    """
    files = _files(sizes, max(number_of_bytes(max_shard_size, "max_shard_size"), 1))
    try:
        with _local(folder, upload=True) as (target, upload):
            target.mkdir(parents=True, exist_ok=True)
            for number, names in enumerate(files, 1):
                _write(read(names), target / _file_name(number, len(files)))
                upload()
            _finish(target, files, sum(sizes.values()))
            upload()
    except OSError as error:
        raise StateError(f"export could not write to {os.fspath(folder)!r}: {error}") from error
    return len(files)


def load(model: nn.Module, folder: str | os.PathLike[str], world: World) -> None:
    """Load safetensors files, with an index where there are several, into the user's module, wherever it is cut.

    Each rank reads one tensor at a time. Raises `StateError` on every rank, before anything is changed, with all names
    that are missing, foreign or of another shape.
    """
    reason = None
    with ExitStack() as stack:
        try:
            places, slots = _matched(model, stack.enter_context(_local(folder))[0])
        except (OSError, StateError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        reasons = [one for one in collectives.all_gather_objects(reason, world) if one is not None]
        if reasons:
            raise StateError(f"load_model changed nothing: {os.fspath(folder)!r}: {reasons[0]}")
        for name, opened in places.items():
            copy_whole(opened.get_tensor(name), slots[name])


def _matched(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The open file of every tensor, and the tensors of the model by all their names."""
    from safetensors import safe_open

    index = folder / INDEX
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {_file_name(1, 1)}
    places: dict[str, Any] = {}
    for name in sorted(names):
        if Path(name).name != name:
            raise StateError(f"the index leads elsewhere: {name!r}")
        opened: Any = safe_open(folder / name, framework="pt")
        places |= dict.fromkeys(opened.keys(), opened)
    state = model.state_dict(keep_vars=True)
    slots = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    there = {id(slots[name]) for name in places if name in slots}
    missing = sorted(name for name, slot in slots.items() if id(slot) not in there)
    foreign = sorted(places.keys() - slots.keys())
    shapes = {name: tuple(places[name].get_slice(name).get_shape()) for name in places.keys() & slots.keys()}
    reshaped = [
        f"{name} is {shapes[name]} and should be {tuple(slots[name].shape)}"
        for name in sorted(shapes)
        if shapes[name] != tuple(slots[name].shape)
    ]
    wrong = [
        f"{kind}: {listed(found)}"
        for kind, found in (("missing", missing), ("foreign", foreign), ("other shapes", reshaped))
        if found
    ]
    if wrong:
        raise StateError(f"it is of another model than this {type(model).__name__}. " + "; ".join(wrong))
    return places, slots


@contextmanager
def _local(folder: str | os.PathLike[str], *, upload: bool = False) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder on this machine that stands for `folder`, which may be a URL of `fsspec`; and what takes files there.

    To be read from, it holds what is there. Files that were taken there are no longer here.
    """
    url = os.fspath(folder)
    if "://" not in url:
        yield Path(url), lambda: None
        return
    import fsspec  # type: ignore[import-untyped,unused-ignore]

    system, place = fsspec.core.url_to_fs(url)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)

        def take() -> None:
            system.makedirs(place, exist_ok=True)
            for path in sorted(here.iterdir()):
                system.put_file(str(path), f"{place}/{path.name}")
                path.unlink()

        if not upload:
            for found in system.ls(place, detail=False):
                if found.endswith((".safetensors", ".index.json")):
                    system.get_file(found, str(here / Path(found).name))
        yield here, take


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


def _files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
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


def _finish(target: Path, files: Sequence[Sequence[str]], total: int) -> None:
    """Write the index, and remove what an earlier save into this folder left."""
    written = {_file_name(number, len(files)) for number in range(1, len(files) + 1)}
    index = target / INDEX
    if len(files) > 1:
        weight_map = {name: _file_name(number, len(files)) for number, names in enumerate(files, 1) for name in names}
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
