"""Write a checkpoint, on every rank together: first what it holds is collected, then files are made of that."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import World
from strategies.accumulation import Accumulation
from strategies.errors import StateError

from . import folder as folders
from . import random_state, tensors, windows
from .content import Content
from .encode import encode
from .peers import Peers

STATE, TENSORS, LOCK = "state.json", "tensors", ".lock"


@dataclass(frozen=True)
class Draft:
    """Everything that a checkpoint will hold: JSON, and tensors, which are not copied until they are staged."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def staged(self, before: dict[str, Tensor]) -> Draft:
        """The same with copies of the tensors in CPU memory, in that of `before` where it fits."""
        return replace(self, tensors=tensors.stage(self.tensors, before))


def collect(accumulation: Accumulation, registered: Sequence[Any], about: dict[str, Any], peers: Peers) -> Draft:
    """What there is to save at this moment. Collective."""
    world = accumulation.world
    content = peers.together(lambda: Content(accumulation, registered))
    state, found = peers.together(content.collect)
    state["windows"] = peers.gather(peers.together(lambda: windows.collect(content, accumulation, found)))
    state["random"] = peers.gather(encode(random_state.read(world), "random", {}))
    about = {**about, "versions": _versions(), "world": {"size": world.size}, "time": time.time()}
    return Draft(state, found, about)


def write(draft: Draft, target: Path, peers: Peers) -> None:
    """Put the files of a draft into place as `target`, all or none. Collective.

    Raises `StateError` on every rank if any of them fails; what was there before is then untouched.
    """
    world = peers.world
    hidden = folders.hidden_beside(target)
    with contextlib.ExitStack() as stack:
        peers.together(lambda: stack.enter_context(_only_writer(target.parent, world)))
        try:
            peers.on_main(lambda: _make(hidden))
            tensors.write(draft.tensors, hidden / TENSORS, world, peers.group)
            peers.on_main(lambda: (hidden / STATE).write_text(json.dumps(draft.state)))
            entries = peers.gather(peers.together(lambda: _digests(hidden, world)))
            listed = {name: entry for part in entries for name, entry in part.items()}
            peers.on_main(lambda: folders.commit(hidden, target, listed, draft.about))
        except BaseException:
            if world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
            raise


@contextlib.contextmanager
def _only_writer(parent: Path, world: World) -> Iterator[None]:
    """Hold the lock of a folder of checkpoints while one is written. Raises `StateError` if another job has it."""
    if not world.is_main:
        yield
        return
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another job is writing a checkpoint into {str(parent)!r}; give each its own") from None
        folders.clear_up(parent)
        yield


def _make(hidden: Path) -> None:
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()


def _digests(hidden: Path, world: World) -> dict[str, folders.FileEntry]:
    """Size and digest of this rank's share of the files, which are put on the disk."""
    paths = sorted(path for path in hidden.rglob("*") if path.is_file())
    found = {}
    for path in paths[world.rank :: world.size]:
        folders.flush(path)
        found[path.relative_to(hidden).as_posix()] = folders.entry_of(path)
    return found


def _versions() -> dict[str, str]:
    from importlib import metadata

    try:
        own = metadata.version("torch-accelerator")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"accelerator": own, "torch": torch.__version__, "python": platform.python_version()}
