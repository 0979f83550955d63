"""Write a checkpoint, on every rank together: first what it holds is collected, then files are made of that."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
import uuid
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
from . import random_state, replicas, tensors, windows
from .content import Content
from .encode import encode
from .lineage import Lineage
from .peers import Peers

STATE, TENSORS, LOCK = "state.json", "tensors", ".lock"
_SECONDS_OF_AN_EXCHANGE = 10.0


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
    state: dict[str, Any] = {}
    found: dict[str, Tensor] = {}

    def of_this_rank() -> tuple[Any, ...]:
        shared, of_shared = content.collect()
        state.update(shared)
        found.update(of_shared if world.is_main else replicas.of_other_ranks(content, of_shared))
        buffers = replicas.collect(content, accumulation, found)
        return windows.collect(content, accumulation, found), buffers, encode(random_state.read(world), "random", {})

    state["windows"], state["buffers"], state["random"] = map(list, zip(*peers.each(of_this_rank), strict=True))
    about = {**about, "versions": _versions(), "world": topology(world), "time": time.time()}
    return Draft(state, found, about)


def write(draft: Draft, target: Path, peers: Peers, *, lineage: Lineage | None, project_dir: Path | None) -> None:
    """Put the files of a draft into place as `target`, all or none. Collective.

    `lineage` is given where this job alone may write other checkpoints beside it. Raises `StateError` on every rank if
    any of them fails, or if anything but a checkpoint is there; what was there before is then untouched.
    """
    world = peers.world
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[str, str]:
            token = uuid.uuid4().hex
            if world.is_main:
                folders.refuse_loss(target, project_dir)
                stack.enter_context(_only_writer(target, lineage is not None))
                if lineage is not None:
                    lineage.check(target.parent)
                hidden = folders.hidden_beside(target, token)
                hidden.mkdir()
                stack.callback(lambda: shutil.rmtree(hidden, ignore_errors=True))  # what has not taken its place
            return token, str(target)

        token, place = peers.each(begin)[0]
        hidden = folders.hidden_beside(target, token)
        peers.together(lambda: _find(hidden, place))
        written = tensors.write(draft.tensors, hidden / TENSORS, world, peers.group)
        mine = {f"{TENSORS}/{name}": entry for name, entry in written.items()}
        listed = {name: entry for part in peers.gather(mine) for name, entry in part.items()}
        peers.on_main(lambda: _commit(draft, hidden, target, listed))
        if lineage is not None and world.is_main:
            lineage.look(target.parent)


@contextlib.contextmanager
def _only_writer(target: Path, beside: bool) -> Iterator[None]:
    """Hold the lock of `target`, and with `beside` that of its folder. Raises `StateError` if another job has one."""
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    own = parent / f"{LOCK}-{target.name}"
    with contextlib.ExitStack() as stack:
        if beside:
            _lock(stack, parent / LOCK, f"into {str(parent)!r}")
        _lock(stack, own, f"to {str(target)!r}")
        stack.callback(lambda: own.unlink(missing_ok=True))  # while it is held
        folders.clear_up(parent, None if beside else target.name)
        yield


def bring_back(parent: Path, name: str | None = None) -> None:
    """Have the checkpoint of `name`, or of any step, in its place again whose exchange was killed in the middle.

    One that another process is just exchanging is waited for. Whoever only reads calls it, on one rank.
    """
    until = time.monotonic() + _SECONDS_OF_AN_EXCHANGE
    for place in folders.half_exchanged(parent, name):
        while not place.exists() and time.monotonic() < until:
            try:
                with _only_writer(place, beside=False):
                    pass
            except StateError:
                time.sleep(0.01)
            except OSError:  # a folder that may only be read: the next writer does it
                break


def _lock(stack: contextlib.ExitStack, path: Path, where: str) -> None:
    while True:
        file = stack.enter_context(path.open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another job is writing a checkpoint {where}; give each its own") from None
        with contextlib.suppress(FileNotFoundError):  # deleted by the job that had it before
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return


def _find(hidden: Path, place: str) -> None:
    """Raise `StateError` unless this rank sees the folder that rank 0 has made."""
    if not hidden.is_dir():
        here = str(hidden.parent)
        raise StateError(
            f"the folder in which rank 0 writes {place!r} is not there for this rank, in {here!r}. Give all ranks the "
            "same path, on a disk that all machines share."
        )


def _commit(draft: Draft, hidden: Path, target: Path, files: dict[str, folders.FileEntry]) -> None:
    """Write what is no tensor, and put the folder in its place. Raises `StateError` unless all files are here."""
    missing = [name for name, entry in files.items() if not _has_size(hidden / name, entry.size)]
    if missing or not {f"{TENSORS}/{name}" for name in tensors.files_of(hidden / TENSORS)} <= files.keys():
        raise StateError(
            f"rank 0 does not see all files that ranks wrote to {str(hidden)!r}: {', '.join(missing[:5])}. Give all "
            "ranks the same path, on a disk that all machines share."
        )
    files[STATE] = folders.write_file(hidden / STATE, json.dumps(draft.state).encode())
    folders.commit(hidden, target, files, draft.about)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def topology(world: World) -> dict[str, Any]:
    """How the ranks of a run are laid out, as a manifest has it."""
    mesh = world.mesh
    sizes = None if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    return {"size": world.size, "local_size": world.local_size, "device": world.device.type, "mesh": sizes}


def _versions() -> dict[str, str]:
    from importlib import metadata

    try:
        own = metadata.version("torch-accelerator")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"accelerator": own, "torch": torch.__version__, "python": platform.python_version()}
