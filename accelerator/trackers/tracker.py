"""What a tracker is, and the values it may be given besides numbers and text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Image:
    """A picture: (height, width) or (height, width, 3), uint8, or floats from 0 to 1; a tensor or an array."""

    pixels: Any
    caption: str = ""

    def array(self) -> NDArray[np.uint8]:
        """(height, width, 3) of uint8."""
        found = np.asarray(self.pixels)
        if found.dtype != np.uint8:
            found = np.rint(np.clip(found.astype(np.float32), 0, 1) * 255).astype(np.uint8)
        found = found[:, :, None] if found.ndim == 2 else found
        return np.repeat(found, 3 // found.shape[2], axis=2)


@dataclass(frozen=True)
class Histogram:
    """How values of any shape, a tensor or an array, are spread over `num_bins` bins of equal width."""

    values: Any
    num_bins: int = 64

    def counts(self) -> tuple[list[int], list[float]]:
        """Counts per bin and the `num_bins + 1` edges, of the finite values."""
        counts, edges = np.histogram(self.finite(), bins=self.num_bins)
        return counts.tolist(), edges.tolist()

    def finite(self) -> NDArray[np.float64]:
        """The values that are finite, in one dimension."""
        flat = np.asarray(self.values, dtype=np.float64).reshape(-1)
        return flat[np.isfinite(flat)]


@dataclass(frozen=True)
class Table:
    """Rows of numbers or text under named columns, as they are when they are logged."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


Value: TypeAlias = float | int | bool | str | Image | Histogram | Table


@dataclass(frozen=True)
class Run:
    """The run that a tracker is told of: its folder, the process, and the step after which it goes on, if it does."""

    folder: Path | None
    rank: int = 0
    size: int = 1
    resumed: int | None = None

    @property
    def name(self) -> str:
        """The name of the folder, for people."""
        return self.folder.absolute().name if self.folder is not None else "run"


class Tracker(ABC):
    """Keeps what a run logs. Only `log` must be written.

    Methods are called one at a time in a thread of their own, never in the loop's; `begin` comes first and `close`
    last. What one raises is reported once, and the run goes on. `begin` may be slow: it is where files are opened and
    heavy packages imported. The constructor runs on every rank, before `begin`, and raises if something is missing.
    """

    all_ranks: ClassVar[bool] = False
    """Whether every rank has one and logs its own values, instead of the main process alone."""

    needs_folder: ClassVar[bool] = False
    """Whether it cannot do without a `project_dir`."""

    optimizer_steps: int = 0
    """Steps that the optimizer had taken at the call whose values `log` is given; they may have another `step`."""

    def begin(self, run: Run) -> None:  # noqa: B027  # not every tracker has something to open
        """Open the run: a new one, or with `run.resumed` the one that is in its folder."""

    def log_config(self, config: Mapping[str, Any]) -> None:  # noqa: B027  # nor keeps a configuration
        """Keep the settings of the run and what the script calls its configuration."""

    @abstractmethod
    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Keep the values of one step. Returns the names of those that it cannot keep, which are reported once.

        `time` is in seconds since 1970, of the call.
        """

    def resume(self, step: int) -> None:  # noqa: B027  # a tracker may be unable to take points back
        """The run, already begun, goes back to after `step` of the optimizer: what came later will be logged again."""

    def close(self) -> None:  # noqa: B027  # nor has something to close
        """Write what is left. Nothing is called after."""
