"""What a process knows about itself and its peers: a frozen value returned by `Strategy.setup()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands.

    `rank` counts over all nodes, `local_rank` on this node; `size` and `local_size` are the numbers of
    processes. `device` is where this process computes. `mesh` is set by strategies that lay devices out
    in a mesh. `backend` is the name of the process group's backend, `None` without a process group.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    mesh: DeviceMesh | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}; expected 0 <= rank < size, and size is {self.size}")
        if not 0 <= self.local_rank < self.local_size:
            raise ValueError(
                f"local_rank is {self.local_rank}; expected 0 <= local_rank < local_size, "
                f"and local_size is {self.local_size}"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of all nodes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0
