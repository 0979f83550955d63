"""How many micro-batches make a window: given, or derived from a global batch size and what a loader gives."""

from __future__ import annotations

from typing import Any

from strategies import ConfigurationError, World
from strategies.sources import Cursor

from .config import Resolved


class BatchArithmetic:
    """Accumulation steps from the settings and the loaders that were prepared."""

    def __init__(self, resolved: Resolved, world: World) -> None:
        self._steps = resolved.settings.gradient_accumulation_steps
        self._wanted = resolved.settings.global_batch_size
        self._origin = resolved.origins["global_batch_size"]
        self._world = world
        self._batch_sizes: list[int | None] = []

    def add(self, loaders: list[Any]) -> None:
        """Note prepared loaders. Raises `ConfigurationError` if no loader so far divides the global batch size.

        One that divides it is enough: an evaluation loader may have any batch size. Which of them is trained on
        is known, and checked again, at the first micro-batch.
        """
        self._batch_sizes += [loader.global_batch_size for loader in loaders]
        wanted = self._wanted
        if wanted is not None and loaders and not any(size and wanted % size == 0 for size in self._batch_sizes):
            self._refuse(wanted, self._batch_sizes)

    @property
    def has_loaders(self) -> bool:
        """Whether any loader was prepared."""
        return bool(self._batch_sizes)

    @property
    def steps(self) -> int:
        """Micro-batches per window; with a global batch size, for the first loader that divides it."""
        wanted = self._wanted
        if wanted is None:
            return self._steps
        for size in self._batch_sizes:
            if size and wanted % size == 0:
                return wanted // size
        raise ConfigurationError(
            f"global_batch_size is {wanted} ({self._origin}), but no dataloader was prepared to derive the "
            "accumulation steps from. Prepare one, or use gradient_accumulation_steps."
        )

    def steps_for(self, cursor: Cursor | None) -> int:
        """Micro-batches of a window over the loader that `cursor` is in."""
        wanted = self._wanted
        if wanted is None:
            return self._steps
        if cursor is None:
            return self.steps
        batch = cursor.global_batch
        if not batch or wanted % batch:
            self._refuse(wanted, [batch])
        assert batch
        return wanted // batch

    def _refuse(self, wanted: int, sizes: list[int | None]) -> None:
        batch = next((size for size in sizes if size), None)
        if batch is None:
            raise ConfigurationError(
                f"global_batch_size is {wanted} ({self._origin}), but the loader has no batch_size to divide it by. "
                "Use gradient_accumulation_steps."
            )
        below = wanted // batch * batch
        nearest = f"{below} or {below + batch}" if below else str(batch)
        takers = f"{self._world.size} processes take" if self._world.size > 1 else "one process takes"
        raise ConfigurationError(
            f"global_batch_size is {wanted} ({self._origin}); expected a multiple of {batch}, what {takers} "
            f"at a time. The nearest that fit: {nearest}. Or change the loader's batch_size."
        )
