"""The random generators of a rank, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from strategies import World


def read(world: World) -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and the device's generators on this rank."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy(),
    }
    if world.device.type == "xla":
        state["device"] = _of_torch_xla().get_rng_state()
    elif world.device.type != "cpu":
        state["device"] = torch.get_device_module(world.device).get_rng_state(world.device).numpy()
    return state


def check(states: Sequence[Mapping[str, Any]], world: World) -> None:
    """Raise for states that no generator takes, before anything is changed."""
    mine = states[world.rank if len(states) == world.size else 0]
    random.Random().setstate(mine["python"])
    np.random.RandomState().set_state(mine["numpy"])
    torch.Generator().set_state(torch.from_numpy(np.array(mine["torch"])))


def restore(states: Sequence[Mapping[str, Any]], world: World) -> bool:
    """Put this rank's generators back where they were; whether that was possible.

    On another number of ranks there is no state that is this rank's. Each then draws from generators seeded by a
    hash of rank 0's state, the number of ranks and its own rank: the same on every such resume, different on every
    rank.
    """
    if len(states) == world.size:
        mine = states[world.rank]
        random.setstate(mine["python"])
        np.random.set_state(mine["numpy"])
        torch.set_rng_state(torch.from_numpy(np.array(mine["torch"])))
        if isinstance(mine.get("device"), int) and world.device.type == "xla":
            _of_torch_xla().set_rng_state(mine["device"])
        elif isinstance(mine.get("device"), np.ndarray) and world.device.type not in ("cpu", "xla"):
            module = torch.get_device_module(world.device)
            module.set_rng_state(torch.from_numpy(np.array(mine["device"])), world.device)
        return True
    words = np.frombuffer(np.asarray(states[0]["torch"], np.uint8).tobytes()[:2496], np.uint32).astype(np.uint64)
    sequence = np.random.SeedSequence([*map(int, words), world.size, world.rank])
    seed = int(sequence.generate_state(1, np.uint64)[0]) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return False


def _of_torch_xla() -> Any:
    import torch_xla.core.xla_model

    return torch_xla.core.xla_model
