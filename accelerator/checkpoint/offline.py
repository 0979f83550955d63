"""Checkpoints looked at without a run: listed, verified, compared, and their weights taken out, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import World
from strategies.errors import StateError, listed

from . import folder as folders
from . import tensors
from .loading import read_state
from .peers import Peers
from .remote import fetched, is_url
from .saving import TENSORS

_TOLD = ("strategy", "mixed_precision", "configuration", "versions", "world")  # of a manifest, by `differences`


@dataclass(frozen=True)
class Summary:
    """One checkpoint in a line; `wrong` says what is not as it was written."""

    name: str
    manifest: dict[str, Any]
    wrong: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(entry["size"] for entry in self.manifest.get("files", {}).values())


@contextmanager
def at(place: str) -> Iterator[Path]:
    """The checkpoint at a path, or a copy of that at a URL of `fsspec`, for the block."""
    if is_url(place):
        with fetched(place, Peers(World())) as copy:
            yield copy
    else:
        yield Path(place)


def summaries(parent: Path, *, verify: bool) -> Iterator[Summary]:
    """Every checkpoint below `parent`, the newest first, or that one alone; with `verify`, all of each is read."""
    paths = [parent] if (parent / folders.MANIFEST).exists() else folders.newest_first(parent)
    if not paths:
        raise StateError(
            f"{str(parent)!r} holds no checkpoint; expected one, or the folder that save_state made of them"
        )
    for path in paths:
        try:
            manifest = folders.read_manifest(path)
            yield Summary(path.name, manifest, tuple(folders.what_is_wrong(path, manifest)) if verify else ())
        except StateError as error:
            yield Summary(path.name, {}, (str(error),))


def models(path: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The models in a verified checkpoint: shape and dtype of every tensor by its name."""
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {name: {} for name in read_state(path)["models"]}
    for key, item in tensors.index_of(path / TENSORS).items():
        kind, _, rest = key.partition("/")
        model, _, name = rest.partition("/")
        if kind == "model" and model in found:
            found[model][name] = item
    return found


def reader(path: Path, model: str) -> Callable[[str], Tensor]:
    """What reads a tensor of a model, by its name: whole, in CPU memory of its own."""
    known, folder = models(path)[model], path / TENSORS
    opened = tensors.reader_of(folder)

    def read(name: str) -> Tensor:
        shape, dtype = known[name]
        target = torch.empty(shape, dtype=dtype)
        tensors.read({f"model/{model}/{name}": target}, folder, World(), opened)
        found = target.detach()
        # torch leaves `target` in cycles, which hold it until they are collected.
        target.data = torch.empty(0, dtype=dtype)
        return found

    return read


def require_whole(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint every file of which is as it was written. Raises `StateError` otherwise."""
    manifest = folders.read_manifest(path)
    wrong = folders.what_is_wrong(path, manifest)
    if wrong:
        raise StateError(f"{str(path)!r} is not as it was written: {listed(wrong)}")
    return manifest


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two checkpoints, in lines: tensors one at a time, then every value of the rest."""
    about = [require_whole(path) for path in (one, two)]
    first, second = tensors.index_of(one / TENSORS), tensors.index_of(two / TENSORS)
    lines = [f"only in {one.name}: {name}" for name in sorted(first.keys() - second.keys())]
    lines += [f"only in {two.name}: {name}" for name in sorted(second.keys() - first.keys())]
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            lines.append(f"{name}: {_words(first[name])} and {_words(second[name])}")
            continue
        pair = [{name: torch.empty(first[name][0], dtype=first[name][1])} for _ in range(2)]
        for target, path in zip(pair, (one, two), strict=True):
            tensors.read(target, path / TENSORS, World())
        left, right = pair[0][name], pair[1][name]
        if not torch.equal(left, right):
            lines.append(f"{name}: differs by up to {(left.double() - right.double()).abs().max().item():.3g}")
    told = [{key: value for key, value in body.items() if key in _TOLD} for body in about]
    return [*lines, *_values("", read_state(one), read_state(two)), *_values("", *told)]


def _values(path: str, one: Any, two: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            yield from _values(f"{path}/{key}" if path else key, one.get(key), two.get(key))
    elif one != two:
        yield f"{path}: {json.dumps(one):.60} and {json.dumps(two):.60}"


def _words(item: tuple[torch.Size, torch.dtype]) -> str:
    return f"{tuple(item[0])} of {str(item[1]).removeprefix('torch.')}"
