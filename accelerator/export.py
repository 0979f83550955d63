"""Weights of a prepared model, taken out of it: as a state dict, or as safetensors files that others read."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies import World, collectives, xla_layout
from strategies.blocks import class_name
from strategies.errors import ConfigurationError, StateError, listed
from strategies.shards import copy_whole, is_quantized, is_sharded, local, whole

from .byte_sizes import number_of_bytes
from .fit import differing_ties, misfit

INDEX = "model.safetensors.index.json"
_WRITING = ".writing"


def own_module(model: nn.Module, *, keep_fp32_wrapper: bool, keep_torch_compile: bool) -> nn.Module:
    """The user's `model` as it is, or what `torch.compile` was given."""
    if keep_fp32_wrapper:
        raise ConfigurationError(
            "keep_fp32_wrapper is True; expected False: modules have no such wrapper here. For outputs in the "
            "precision of training call the prepared model, or the module inside `with accelerator.autocast():`."
        )
    return model if keep_torch_compile else getattr(model, "_orig_mod", model)


def state_dict(model: nn.Module, world: World, *, sharded: bool) -> dict[str, Any]:
    """The weights of the user's module: whole on rank 0, in CPU memory, and empty elsewhere; or as they are cut."""
    state = model.state_dict()
    if sharded:
        return dict(state)
    if any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
        collectives.meet("get_state_dict", world)  # gloo ends a process that gathers while others do something else
    return dict(_gathered(state, world))


def save(model: nn.Module, folder: str | os.PathLike[str], world: World, *, max_shard_size: int | str) -> None:
    """Write the weights as safetensors, with the index that the Hugging Face ecosystem reads where there are several.

    Rank 0 writes, and holds one file of at most `max_shard_size` bytes at a time. Tied weights are written once. What
    an earlier save left in `folder` stays until all new files are written.
    """
    limit = max(number_of_bytes(max_shard_size, "max_shard_size"), 1)  # at 0, a file for each tensor
    collectives.meet("save_model", world)
    state = _without_ties(model)
    quantized = [name for name, tensor in state.items() if is_quantized(tensor)]
    if quantized:
        raise StateError(
            f"{listed(quantized)} of {class_name(model)} are quantized, which safetensors cannot hold. Keep the "
            "checkpoint that they were loaded from, and load it with quantize= again."
        )
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    files = _files(sizes, limit)
    target = _Folder(os.fspath(folder))
    _on_main(target.make, target, world)
    try:
        for number, names in enumerate(files, 1):
            part = dict(_gathered({name: state[name] for name in names}, world))
            _on_main(functools.partial(_write, part, target, _file_name(number, len(files))), target, world)
            del part
    except StateError:
        if world.is_main:
            with suppress(OSError):
                target.discard()
        raise
    _on_main(lambda: _take_the_place(target, files, sum(sizes.values())), target, world)


def write_files(
    sizes: Mapping[str, int],
    read: Callable[[list[str]], dict[str, Tensor]],
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
) -> int:
    """Write tensors of these sizes in bytes, of which `read` gives some at a time; return the number of files.

    One process calls it, and holds one file at a time. `folder` may be a URL of `fsspec`. What an earlier export left
    there stays until all new files are.
    """
    files = _files(sizes, max(number_of_bytes(max_shard_size, "max_shard_size"), 1))
    url = os.fspath(folder)
    try:
        target = _Remote(url) if "://" in url else _Folder(url)
        target.make()
        try:
            for number, names in enumerate(files, 1):
                _write(read(names), target, _file_name(number, len(files)))
        except OSError:
            target.discard()
            raise
        _take_the_place(target, files, sum(sizes.values()))
    except OSError as error:
        raise StateError(f"export could not write to {url!r}: {error}") from error
    return len(files)


def load(model: nn.Module, folder: str | os.PathLike[str], world: World) -> None:
    """Load safetensors files, with an index where there are several, into the user's module, wherever it is cut.

    Each rank reads one tensor at a time. Raises `StateError` on every rank, before anything is changed, for files that
    are damaged, and with all names that are missing, foreign, of another shape or kind of number, or in conflict.
    """
    from .bigmodel.pages import give_back

    reason = None
    with ExitStack() as stack:
        try:
            places, slots = _matched(model, stack.enter_context(_local(folder)))
        except (OSError, StateError) as error:
            reason = str(error)
        reasons = [one for one in collectives.all_gather_objects(reason, world) if one is not None]
        if reasons:
            raise StateError(f"load_model changed nothing: {os.fspath(folder)!r}: {reasons[0]}")
        for name, tensor in places.items():
            copy_whole(tensor, slots[name])
            give_back(tensor)


def _matched(model: nn.Module, folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The tensors of the files, mapped, and those of the model by all their names."""
    from .bigmodel.files import tensors_of

    index = folder / INDEX
    places = tensors_of(index if index.exists() else folder / _file_name(1, 1))
    state = model.state_dict(keep_vars=True)
    slots = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    names: dict[int, list[str]] = {}
    for name, slot in slots.items():
        names.setdefault(id(slot), []).append(name)
    there = {id(slots[name]) for name in places if name in slots}
    missing = sorted(name for name, slot in slots.items() if id(slot) not in there)
    foreign = sorted(places.keys() - slots.keys())
    unlike = [
        problem
        for name in sorted(places.keys() & slots.keys())
        if (problem := misfit(name, places[name], slots[name], slots[name].dtype))
    ]
    conflicts = [tie for tied in names.values() if not unlike and (tie := differing_ties(tied, places))]
    wrong = [
        f"{kind}: {listed(found)}"
        for kind, found in (
            ("missing", missing),
            ("foreign", foreign),
            ("other shapes or kinds", unlike),
            ("conflicts", conflicts),
        )
        if found
    ]
    if wrong:
        raise StateError(f"it is of another model than this {class_name(model)}. " + "; ".join(wrong))
    return places, slots


@contextmanager
def _local(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder on this machine with what is in `folder`, which may be a URL of `fsspec`."""
    url = os.fspath(folder)
    if "://" not in url:
        yield Path(url)
        return
    remote = _Remote(url)
    with tempfile.TemporaryDirectory() as temporary:
        for name in remote.names():
            if name.endswith((".safetensors", ".index.json")):
                remote.fetch(name, Path(temporary, name))
        yield Path(temporary)


class _Folder:
    """A folder that files are written to, first under other names."""

    def __init__(self, path: str) -> None:
        self.path = path

    def make(self) -> None:
        Path(self.path).mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return os.listdir(self.path)

    def remove(self, name: str) -> None:
        os.remove(Path(self.path, name))

    def rename(self, name: str, new: str) -> None:
        os.replace(Path(self.path, name), Path(self.path, new))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; what is there at the end of the block is in the folder under this name."""
        yield Path(self.path, name)

    def discard(self) -> None:
        """Remove what has not taken its place."""
        for name in self.names():
            if name.endswith(_WRITING) and _is_ours(name.removesuffix(_WRITING)):
                self.remove(name)


class _Remote(_Folder):
    """The same at a URL of `fsspec`."""

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped,unused-ignore]

        self._system, place = fsspec.core.url_to_fs(url)
        super().__init__(place)

    def make(self) -> None:
        self._system.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        self._system.invalidate_cache(self.path)
        return [Path(name).name for name in self._system.ls(self.path, detail=False)]

    def remove(self, name: str) -> None:
        self._system.rm_file(f"{self.path}/{name}")

    def rename(self, name: str, new: str) -> None:
        self._system.mv(f"{self.path}/{name}", f"{self.path}/{new}")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary, name)
            self._system.put_file(str(Path(temporary, name)), f"{self.path}/{name}")

    def fetch(self, name: str, path: Path) -> None:
        self._system.get_file(f"{self.path}/{name}", str(path))


def _gathered(state: dict[str, Any], world: World) -> Iterator[tuple[str, Any]]:
    """Every value whole, on rank 0 only; one tensor at a time is whole on the others. Collective."""
    from .bigmodel.pages import give_back

    for name, value in state.items():
        if isinstance(value, Tensor):
            full = whole(value)
            if world.is_main:
                is_fresh = _is_fresh(full, value)
                yield name, _on_host(full) if is_fresh else full.clone()
                if not is_fresh:
                    give_back(full)  # if it is mapped from a file
            del full
        elif world.is_main:
            yield name, value


def _is_fresh(full: Tensor, value: Tensor) -> bool:
    """Whether the model does not hold the memory of `full`, made of `value`, so that it needs no other copy."""
    if full.device.type != "cpu":
        return True
    return is_sharded(value) and full.untyped_storage().data_ptr() != local(value).untyped_storage().data_ptr()


def _on_host(tensor: Tensor) -> Tensor:
    return xla_layout.on_host(tensor) if tensor.device.type == "xla" else tensor.cpu()


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


def _is_ours(name: str) -> bool:
    return name == INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def _write(part: dict[str, Tensor], target: _Folder, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with target.writing(name + _WRITING) as path:
        try:
            save_file({name: value.contiguous() for name, value in part.items()}, path, metadata={"format": "pt"})
        except SafetensorError as error:  # also for a full disk
            raise OSError(str(error)) from error


def _take_the_place(target: _Folder, files: Sequence[Sequence[str]], total: int) -> None:
    """Have all written files replace those of an earlier save. At no moment do files of both look like one model."""
    new = [_file_name(number, len(files)) for number in range(1, len(files) + 1)]
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(new, files, strict=True) for name in names}
        with target.writing(INDEX + _WRITING) as path:
            path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        new.append(INDEX)
    for name in sorted(filter(_is_ours, target.names()), key=lambda name: name != INDEX):
        if len(new) > 1 or name != new[0]:  # a single file takes the place of another at once
            target.remove(name)
    for name in new:
        target.rename(name + _WRITING, name)
    target.discard()


def _on_main(write: Callable[[], Any], target: _Folder, world: World) -> None:
    """Have rank 0 call `write`; raise `StateError` on every rank if it could not. Collective."""
    reason = None
    if world.is_main:
        try:
            write()
        except OSError as error:
            reason = str(error)
    reason = collectives.broadcast(reason, world)
    if reason is not None:
        raise StateError(f"save_model could not write to {target.path!r}: {reason}")
