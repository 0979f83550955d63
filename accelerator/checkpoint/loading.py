"""Read a checkpoint, on every rank together: all files are verified before anything is changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from strategies.accumulation import Accumulation
from strategies.errors import StateError

from . import folder as folders
from . import random_state, replicas, tensors, windows
from .content import Content
from .encode import decode
from .peers import Peers
from .saving import STATE, TENSORS

_log = logging.getLogger("accelerator")


def newest(parent: Path, peers: Peers) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint below `parent` written last of those that are whole, and its manifest. Collective.

    `None` if there is none. Warns of those that are not whole, and where another has a higher step. Raises `StateError`
    if there are some, and none is whole.
    """
    peers.on_main(lambda: folders.bring_back(parent))
    here = [path.name for path in folders.newest_first(parent)] if peers.world.is_main else []
    reasons: list[str] = []
    names = peers.gather(here)[0]
    for name in names:
        try:
            manifest = verified(parent / name, peers)
            if peers.world.is_main and max(names) > name and not reasons:
                _log.warning(
                    "taking %s, which was written last, although there is %s, written before", name, max(names)
                )
            return parent / name, manifest
        except StateError as error:
            reasons.append(str(error))
            if peers.world.is_main:
                _log.warning("%s: trying an older checkpoint", error)
    if reasons:
        raise StateError(f"none of the {len(reasons)} checkpoints in {str(parent)!r} is whole: {'; '.join(reasons)}")
    return None


def verified(path: Path, peers: Peers, *, per_machine: bool = False) -> dict[str, Any]:
    """The manifest of a checkpoint every file of which is as it was written; each rank looks at a part. Collective.

    `per_machine`: each machine has a copy of its own.
    """
    world = peers.world
    share = (world.local_rank, world.local_size) if per_machine else (world.rank, world.size)
    manifest: dict[str, Any] = {}

    def place() -> tuple[str, str]:
        manifest.update(folders.read_manifest(path))
        return str(path), folders.digest_of(manifest)

    places = peers.each(place)
    if len({digest for _, digest in places}) > 1:
        raise StateError(
            f"ranks see other checkpoints in {sorted({place for place, _ in places})}. Give all ranks the same path, "
            "on a disk that all machines share."
        )
    wrong = peers.each(lambda: folders.what_is_wrong(path, manifest, *share))
    everywhere = [item for part in wrong for item in part]
    if everywhere:
        raise StateError(f"{str(path)!r} is not as it was written: {'; '.join(everywhere[:5])}")
    return manifest


def load(
    path: Path, manifest: dict[str, Any], accumulation: Accumulation, registered: Sequence[Any], peers: Peers
) -> None:
    """Load a verified checkpoint. Collective. Raises `StateError` before anything is changed if it does not fit."""
    world = peers.world

    def prepared() -> tuple[Content, dict[str, Any], dict[str, torch.Tensor]]:
        content = Content(accumulation, registered)
        state = read_state(path)
        index = tensors.index_of(path / TENSORS)
        content.check(state, index)
        windows.check(state["windows"], index, accumulation.precision.mode, manifest.get("mixed_precision", ""))
        own = replicas.targets(state.get("buffers", []), index, content, accumulation)
        targets = {**content.targets(state, index), **own}
        return content, state, {name: target for name, target in targets.items() if target is not None}

    content, state, targets = peers.together(prepared)
    tensors.read(targets, path / TENSORS, world)
    content.apply(state, targets)
    windows.restore(state["windows"], path / TENSORS, content, accumulation)
    if not random_state.restore([decode(one, {}) for one in state["random"]], world) and world.is_main:
        _log.warning(
            "the checkpoint was written on %d processes and is read on %d: random numbers, such as dropout's, go on "
            "from a seed derived from it",
            len(state["random"]),
            world.size,
        )


def read_state(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{str(path / STATE)!r} cannot be read: {error!r}") from error
    return state
