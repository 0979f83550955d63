"""Save and load, on every rank together: all return the same, or all raise with the reason."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from strategies import World, collectives
from strategies.accumulation import Accumulation
from strategies.errors import StateError

from . import folder as folders
from . import random_state, tensors, windows
from .content import Content
from .encode import decode, encode

T = TypeVar("T")
_log = logging.getLogger("accelerator")
_STATE, _TENSORS, _LOCK = "state.json", "tensors", ".lock"


def save(
    target: Path, accumulation: Accumulation, registered: Sequence[Any], about: dict[str, Any], *, keep_last: int | None
) -> None:
    """Write a checkpoint to `target`, whole or not at all. Collective.

    With `keep_last`, the oldest checkpoints beside it are deleted afterwards, until so many are left. Raises
    `StateError` on every rank if any of them fails; what was there before is then untouched.
    """
    world = accumulation.world
    hidden = folders.hidden_beside(target)
    content = _together(lambda: Content(accumulation, registered), world)
    state, found = _together(content.collect, world)
    open_windows = _together(lambda: windows.collect(content, accumulation, found), world)
    state["windows"] = collectives.all_gather_objects(open_windows, world)
    state["random"] = collectives.all_gather_objects(encode(random_state.read(world), "random", {}), world)
    with contextlib.ExitStack() as stack:
        _together(lambda: stack.enter_context(_only_writer(target.parent, world)), world)
        try:
            _together(lambda: _make(hidden) if world.is_main else None, world)
            tensors.write(found, hidden / _TENSORS, world)
            about = {**about, "versions": _versions(), "world": {"size": world.size}, "time": time.time()}
            _together(lambda: _write_state(hidden / _STATE, state) if world.is_main else None, world)
            entries = _together(lambda: _digests(hidden, world), world)
            listed = {
                name: entry for part in collectives.all_gather_objects(entries, world) for name, entry in part.items()
            }
            _together(lambda: folders.commit(hidden, target, listed, about) if world.is_main else None, world)
        except BaseException:
            if world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        if keep_last is not None and world.is_main:
            _delete_oldest(target, keep_last)


def resume(parent: Path, accumulation: Accumulation, registered: Sequence[Any]) -> Path | None:
    """Load the newest checkpoint below `parent` that is whole; `None` if there is none at all. Collective.

    Warns of those that are not. Raises `StateError` if there are some, and none is whole.
    """
    world = accumulation.world
    here = [path.name for path in folders.newest_first(parent)] if world.is_main else None
    found: list[str] = collectives.broadcast(here, world)
    reasons = []
    for name in found:
        try:
            manifest = verified(parent / name, world)
        except StateError as error:
            reasons.append(str(error))
            if world.is_main:
                _log.warning("%s: trying an older checkpoint", error)
            continue
        _load(parent / name, manifest, accumulation, registered)
        return parent / name
    if reasons:
        raise StateError(f"none of the {len(reasons)} checkpoints in {str(parent)!r} is whole: {'; '.join(reasons)}")
    return None


def load(path: Path, accumulation: Accumulation, registered: Sequence[Any]) -> None:
    """Load the checkpoint at `path`. Collective. Raises `StateError` before anything is changed if it does not fit."""
    _load(path, verified(path, accumulation.world), accumulation, registered)


def verified(path: Path, world: World) -> dict[str, Any]:
    """The manifest of a checkpoint every file of which is as it was written; each rank looks at a part. Collective."""
    manifest = _together(lambda: folders.read_manifest(path), world)
    wrong = _together(lambda: folders.what_is_wrong(path, manifest, world.rank, world.size), world)
    everywhere = [item for part in collectives.all_gather_objects(wrong, world) for item in part]
    if everywhere:
        raise StateError(f"{str(path)!r} is not as it was written: {'; '.join(everywhere[:5])}")
    return manifest


def _load(path: Path, manifest: dict[str, Any], accumulation: Accumulation, registered: Sequence[Any]) -> None:
    world = accumulation.world

    def prepared() -> tuple[Content, dict[str, Any], dict[str, torch.Tensor]]:
        content = Content(accumulation, registered)
        try:
            state = json.loads((path / _STATE).read_text())
        except (OSError, ValueError) as error:
            raise StateError(f"{str(path / _STATE)!r} cannot be read: {error!r}") from error
        index = tensors.index_of(path / _TENSORS)
        content.check(state, index)
        windows.check(state["windows"], index, accumulation.precision.mode, manifest.get("mixed_precision", ""))
        return content, state, content.targets(state, index)

    content, state, targets = _together(prepared, world)
    tensors.read(targets, path / _TENSORS, world)
    content.apply(state, targets)
    windows.restore(state["windows"], path / _TENSORS, content, accumulation)
    if not random_state.restore([decode(one, {}) for one in state["random"]], world) and world.is_main:
        _log.warning(
            "the checkpoint was written on %d processes and is read on %d: random numbers, such as dropout's, go on "
            "from a seed derived from it",
            len(state["random"]),
            world.size,
        )


def _together(function: Callable[[], T], world: World) -> T:
    """Call `function`; raise on every rank if it raised on any, with the reason. Collective."""
    error: Exception | None = None
    try:
        result = function()
    except (OSError, StateError) as problem:
        error = problem
    reasons = collectives.all_gather_objects(None if error is None else str(error), world)
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        rank, reason = failed[0]
        raise StateError(reason if len(failed) == world.size else f"rank {rank}: {reason}") from error
    return result


@contextlib.contextmanager
def _only_writer(parent: Path, world: World) -> Iterator[None]:
    """Hold the lock of a folder of checkpoints while one is written. Raises `StateError` if another job has it."""
    if not world.is_main:
        yield
        return
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another job is writing a checkpoint into {str(parent)!r}; give each its own") from None
        yield


def _make(hidden: Path) -> None:
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.write_text(json.dumps(state))


def _digests(hidden: Path, world: World) -> dict[str, folders.FileEntry]:
    """Size and digest of this rank's share of the files, which are put on the disk."""
    paths = sorted(path for path in hidden.rglob("*") if path.is_file())
    found = {}
    for path in paths[world.rank :: world.size]:
        folders.flush(path)
        found[path.relative_to(hidden).as_posix()] = folders.entry_of(path)
    return found


def _delete_oldest(newest: Path, keep_last: int) -> None:
    beside = [path for path in folders.newest_first(newest.parent) if path.name <= newest.name]
    for path in beside[keep_last:]:
        shutil.rmtree(path, ignore_errors=True)


def _versions() -> dict[str, str]:
    from importlib import metadata

    try:
        own = metadata.version("torch-accelerator")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"accelerator": own, "torch": torch.__version__, "python": platform.python_version()}
