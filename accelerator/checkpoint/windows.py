"""Accumulation windows that are open when a checkpoint is written: what each rank has summed, and its weights.

Ranks do not average inside an open window, so that each keeps gradients of its own. On as many ranks each takes its own
again; on more or fewer all take the mean, which leaves the mean over ranks, the one that training uses, as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import World
from strategies.accumulation import Accumulation
from strategies.errors import StateError
from strategies.shards import is_sharded

from . import tensors
from .content import Content, Index
from .encode import encode, names_of_tensors


def collect(content: Content, accumulation: Accumulation, found: dict[str, Tensor]) -> dict[str, Any]:
    """The open windows of this rank as JSON; their gradients are put into `found`."""
    rank, loaders = accumulation.world.rank, {id(link): name for name, link in content.loaders.items()}
    windows = {}
    for joined, (state, gradients) in accumulation.open_state(content.model_names).items():
        loader = state.pop("loader")
        windows[joined] = {
            "state": {**state, "loader": None if loader is None else loaders[id(loader)]},
            "gradients": {
                model: {
                    name: encode(value, f"gradient/{'all' if is_sharded(value) else rank}/{model}/{name}", found)
                    for name, value in of_model.items()
                }
                for model, of_model in gradients.items()
            },
        }
    return windows


def check(windows: Sequence[Mapping[str, Any]], index: Index, content: Content, precision: str, was: str) -> None:
    """Raise `StateError` for windows that cannot be gone on with, before anything is changed."""
    if not windows[0]:
        return
    for joined, window in [item for of_rank in windows for item in of_rank.items()]:
        unknown = {*joined.split("+"), *window["gradients"]} - content.models.keys()
        unknown |= {window["state"]["loader"]} - {None, *content.loaders}
        if unknown:
            raise StateError(f"the checkpoint holds a window of {', '.join(sorted(unknown))}, which are not there")
    missing = [name for name in names_of_tensors(list(windows)) if name not in index]
    if missing:
        raise StateError(f"the checkpoint names gradients that it does not hold: {', '.join(missing[:5])}")
    if precision != was and "fp16" in (precision, was):
        raise StateError(
            f"the checkpoint was written inside an open accumulation window in mixed_precision={was!r}, whose loss "
            f"scale is in its gradients, and this run has {precision!r}. Load it with {was!r}, or load one from "
            "between windows: load_state(path)."
        )


def open_again(windows: Sequence[Mapping[str, Any]], content: Content, accumulation: Accumulation) -> None:
    """Open the windows of a checkpoint again."""
    for joined in windows[0]:
        states = []
        for of_rank in windows:
            loader = of_rank[joined]["state"]["loader"]
            states.append({**of_rank[joined]["state"], "loader": None if loader is None else content.loaders[loader]})
        accumulation.load_open_state(joined, states, content.models)


def restore(windows: Sequence[Mapping[str, Any]], folder: Path, content: Content, accumulation: Accumulation) -> None:
    """Give the open windows their gradients. Collective."""
    world = accumulation.world
    for joined in windows[0]:
        for model in windows[0][joined]["gradients"]:
            gradients = _read([of_rank[joined]["gradients"][model] for of_rank in windows], folder, world)
            accumulation.strategy.set_open_gradients(content.models[model].wrapped, gradients, world)


def _read(everyone: Sequence[Mapping[str, Any]], folder: Path, world: World) -> dict[str, Tensor]:
    """This rank's gradients by parameter, or the mean of everyone's. Collective."""
    if len(everyone) == world.size:
        return _read_one(everyone[world.rank], folder, world)
    total: dict[str, Tensor] = {}
    for one in everyone:
        for name, gradient in _read_one(one, folder, world).items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: gradient / len(everyone) for name, gradient in total.items()}


def _read_one(gradients: Mapping[str, Any], folder: Path, world: World) -> dict[str, Tensor]:
    index = tensors.index_of(folder)
    places = {name: names_of_tensors(encoded)[0] for name, encoded in gradients.items()}
    read = {
        place: torch.empty(index[place][0], dtype=index[place][1], device=world.device) for place in places.values()
    }
    tensors.read(read, folder, world)
    return {name: read[place] for name, place in places.items()}
