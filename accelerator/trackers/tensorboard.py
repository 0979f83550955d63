"""TensorBoard's event files, in `tensorboard` in the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .tracker import Histogram, Image, Run, Table, Tracker, Value


class TensorBoard(Tracker):
    """Numbers, text, images and histograms; tables and configurations as text. Shows nothing of steps taken back."""

    needs_folder: ClassVar[bool] = True

    def begin(self, run: Run) -> None:
        """Open a file in the folder."""
        assert run.folder is not None
        self._folder = str(run.folder / "tensorboard")
        self._hides = None if run.resumed is None else run.resumed + 1  # from which step on, at the next value
        self._open(None)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """As a table of text at step 0."""
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Add each value under its name."""
        if (
            self._hides is not None
        ):  # not before: where the script counts in another unit, its first step says from where
            self.close()
            self._open(max(self._hides, step))
            self._hides = None
        writer = self._writer
        for name, value in values.items():
            if isinstance(value, Image):
                writer.add_image(name, value.array(), step, walltime=time, dataformats="HWC")
            elif isinstance(value, Histogram):
                if (finite := value.finite()).size:  # it refuses a histogram of nothing, and one with a NaN
                    writer.add_histogram(name, finite, step, walltime=time)
            elif isinstance(value, Table):
                lines = [value.columns, ["---"] * len(value.columns), *value.rows]
                text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
                writer.add_text(name, text, step, walltime=time)
            elif isinstance(value, str):
                writer.add_text(name, value, step, walltime=time)
            else:
                writer.add_scalar(name, value, step, walltime=time)
        return ()

    def resume(self, step: int) -> None:
        """Hide what is there of later steps, as soon as there is a value to begin a new file with."""
        self._hides = step + 1

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(self._folder, purge_step=purge_step, flush_secs=5)
