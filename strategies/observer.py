"""What happens in a loop, told to those who asked: timers, statistics, searches for a NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from .prepared.optimizer import OptimizerLink
    from .sources import Cursor
    from .window import Window


class Observer:
    """Is told what happens in one Accelerator's loop, on every rank, in the loop's own thread.

    Every method does nothing until it is overridden. For each micro-batch they are called in the order below; the last
    two come wherever the script calls a collective. What they raise reaches the loop. None of them may wait for the
    device unless its observer was asked for that: read values of tensors later, or copy them without blocking. A loop
    without observers pays nothing that can be measured.
    """

    def batch_wanted(self, loader: DataLoader[object]) -> None:
        """The loop asks `loader` for its next batch."""

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """The loop gets `batch`; `cursor` tells its loader, epoch, index and samples."""

    def micro_batch_begun(self, window: Window) -> None:
        """`accumulate` was entered; `window.closing` tells whether this micro-batch closes the window."""

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """Forward is over: `loss`, a scalar on the device, the mean over this rank's samples, before scaling."""

    def backward_ended(self, window: Window, loss: Tensor) -> None:
        """Backward is over. On the closing micro-batch ranks have exchanged gradients, but for those of XLA."""

    def gradients_ready(self, optimizer: OptimizerLink) -> None:
        """The gradients are those of the window's mean loss: reduced, rescaled, unscaled; not yet clipped."""

    def gradients_clipped(self, norm: Tensor) -> None:
        """`clip_grad_norm_` ran; `norm` is the norm before, a scalar on the device, the same on every rank."""

    def update_begun(self, optimizer: OptimizerLink) -> None:
        """The optimizer is about to step."""

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """The optimizer stepped, or skipped because of a float16 overflow."""

    def micro_batch_ended(self, window: Window) -> None:
        """`accumulate` was left without an exception."""

    def raised(self, error: BaseException) -> None:
        """`accumulate` was left by an exception, which goes on its way after this."""

    def collective_begun(self) -> None:
        """The script calls a collective: `gather`, `reduce`, `broadcast`, `wait_for_everyone`, ..."""

    def collective_ended(self) -> None:
        """It is over, or raised."""
