"""Read a checkpoint, on every rank together: all files are verified before anything is changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from strategies.accumulation import Accumulation
from strategies.errors import AcceleratorError, StateError

from . import folder as folders
from . import random_state, replicas, tensors, windows
from .content import Content
from .encode import decode
from .peers import Peers
from .saving import STATE, TENSORS, bring_back

_log = logging.getLogger("accelerator")


def newest(parent: Path, peers: Peers, stack: ExitStack) -> tuple[Path, Path, dict[str, Any]] | None:
    """The checkpoint below `parent` written last of those that are whole, a path to read it by, and its manifest.

    Collective. It is held until `stack` is left. `None` if there is none. Warns of those that are not whole, and where
    another has a higher step. Raises `StateError` if there are some, and none is whole, or if it is of a later release.
    """
    reasons: dict[str, str] = {}
    peers.on_main(lambda: bring_back(parent))
    while True:  # looked at anew each time: a training may delete what is read, and write others
        seen = peers.each(lambda: [path.name for path in folders.newest_first(parent)] if peers.world.is_main else [])
        names = [name for name in seen[0] if name not in reasons]
        if not names:
            break
        name = names[0]
        try:
            with ExitStack() as holding:
                here = holding.enter_context(folders.held(parent / name))
                manifest = verified(here, peers)
                stack.push(holding.pop_all())
            if peers.world.is_main and max(names) > name and not reasons:
                _log.warning(
                    "taking %s, which was written last, although there is %s, written before", name, max(names)
                )
            return parent / name, here, manifest
        except StateError as error:
            if peers.gather(peers.world.is_main and folders.is_newer(parent / name))[0]:
                raise  # it is whole, and going on from an older one would lose what it has
            reasons[name] = str(error)
            if peers.world.is_main:
                _log.warning("%s: trying an older checkpoint", error)
    if reasons:
        why = "; ".join(reasons.values())
        raise StateError(f"none of the {len(reasons)} checkpoints in {str(parent)!r} is whole: {why}")
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
        return str(path.resolve()), folders.digest_of(manifest)

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
        try:
            content.check(state, index)
            mode = accumulation.precision.mode
            windows.check(state["windows"], index, content, mode, manifest.get("mixed_precision", ""))
            random_state.check([decode(one, {}) for one in state["random"]], world)
            own = replicas.targets(state.get("buffers", []), index, content, accumulation)
            targets = {**content.targets(state, index), **own}
        except AcceleratorError:
            raise
        except Exception as error:  # nothing is taken for granted of a file that anybody can have written
            raise StateError(f"{str(path / STATE)!r} is not as save_state writes it: {error!r}") from error
        return content, state, {name: target for name, target in targets.items() if target is not None}

    content, state, targets = peers.together(prepared)
    try:
        tensors.read(targets, path / TENSORS, world)
        peers.together(lambda: content.apply(state, targets))
        peers.together(lambda: windows.open_again(state["windows"], content, accumulation))
        windows.restore(state["windows"], path / TENSORS, content, accumulation)
    except StateError as error:
        raise StateError(
            f"{error}. The checkpoint is loaded in part, and the run is a mixture of it and of what was there before: "
            "end it, or load a checkpoint that fits."
        ) from error
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
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{str(path / STATE)!r} cannot be read: {error!r}") from error
    if not isinstance(state, dict):
        raise StateError(f"{str(path / STATE)!r} holds a {type(state).__name__}; expected an object")
    return state
