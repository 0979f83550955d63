"""What `backward` is given: a mean, or the losses of the samples themselves, whose mean is then taken here.

Where short batches are filled up with ghosts, only the losses themselves can be had without those of ghosts: a mean
over rows contains them, and nobody can take them out of it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .errors import StepError
from .sources import Cursor


def is_mean(loss: Any) -> bool:
    """Whether `loss` is one number with a gradient, as backward takes it."""
    return isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and not loss.is_complex()


def mean_loss(
    losses: Any, weight: float | Tensor | None, cursor: Cursor | None, models: Iterable[nn.Module], *, frozen: bool
) -> tuple[Tensor, float | Tensor | None]:
    """The mean of `losses` over the samples of the batch that `cursor` holds, a scalar, and what it weighs.

    `losses`: (batch,), or (batch, ...) with weights of the same shape, of which the mean is then the weighted one, and
    the weight their sum. Rows of ghosts count nothing. Raises `StepError` for anything else, for a scalar where a
    batch may have ghosts, and where `models` would see those in a normalisation over the batch.
    """
    padded = cursor is not None and cursor.padded_to is not None
    if not isinstance(losses, Tensor) or losses.is_complex() or not losses.requires_grad:
        raise StepError(_what_is_wrong(losses, frozen))
    if padded and losses.ndim == 0:
        raise StepError(
            "loss is a scalar, and pad_batches=True fills short batches up with ghosts, which a mean over the batch "
            "would count. Give backward() one loss for each row (reduction='none'): it takes the mean of the samples."
        )
    rows = _num_rows(cursor)
    if losses.ndim == 0 or not losses.numel() or (rows and len(losses) != rows):
        raise StepError(
            f"loss has shape {tuple(losses.shape)}; expected a scalar: the mean over the samples of this micro-batch, "
            f"or one loss per sample, of shape ({rows or 'batch'},)"
        )
    if weight is None and losses.ndim > 1:
        raise StepError(
            f"loss has shape {tuple(losses.shape)}; expected one loss per sample, of shape ({len(losses)},), such as "
            "loss.mean(1). For a mean over tokens give weight= of the same shape: 1 where one counts, 0 elsewhere."
        )
    if cursor is None or not padded:
        if weight is None:
            return losses.mean(), None
        return _weighted(losses, _counts(weight, losses))
    if cursor.num_trained == 1 or cursor.samples != rows:  # before any step of this pass, and where there are ghosts
        for model in models:
            _refuse_normalisation(model)
    rows_of_samples = _rows_of_samples(cursor, losses)
    if weight is None:
        return _weighted(losses, rows_of_samples)[0], None
    return _weighted(losses, _counts(weight, losses) * rows_of_samples)


def _num_rows(cursor: Cursor | None) -> int | None:
    """Rows of the batch in hand, if they are known."""
    if cursor is None or (cursor.is_ghost and not cursor.is_planned):
        return None
    return cursor.padded_to or max(1, cursor.samples)


def as_input(values: Tensor, losses: Tensor) -> Tensor:
    """`values`, not a scalar, on the device of `losses`, without waiting for it, as an input of XLA's program.

    Equal scalars would be one input of it, and 0 and 1 none, so that a batch with others would be another program.
    """
    return values.to(losses.device, _dtype_of_mean(losses), non_blocking=losses.device.type == "cuda")


def _rows_of_samples(cursor: Cursor, losses: Tensor) -> Tensor:
    """1 for the rows of samples and 0 for those of ghosts, in a shape that `losses` are multiplied by."""
    rows = torch.zeros(len(losses), *[1] * (losses.ndim - 1))
    rows[: cursor.samples] = 1.0
    return as_input(rows, losses)


def _counts(weight: float | Tensor, losses: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or weight.shape != losses.shape:
        came = f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise StepError(
            f"weight is {came}, and loss has shape {tuple(losses.shape)}; expected a weight for each loss, of the same "
            "shape. (A single number weighs a scalar loss.)"
        )
    if weight.device.type == "cpu" and not bool((weight >= 0).all()):  # elsewhere, looking would wait for the device
        raise StepError("weight has elements below 0 or NaN; expected finite numbers >= 0, such as counts of tokens")
    return weight.detach().to(losses.device, _dtype_of_mean(losses))


def _weighted(losses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    total = counts.sum()
    return (losses * counts).sum() / total.clamp(min=torch.finfo(total.dtype).tiny), total


def _dtype_of_mean(losses: Tensor) -> torch.dtype:
    return torch.promote_types(losses.dtype, torch.float32)


def _refuse_normalisation(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        over_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        if over_batch or (module.training and module.track_running_stats):
            raise StepError(
                f"{name or type(model).__name__} is {type(module).__name__} in training mode, and pad_batches=True: "
                "its statistics would count the ghosts of a short batch. Use GroupNorm or LayerNorm, or drop_last=True "
                "for this loader, or pad_batches=False; or freeze it with .eval()."
            )


def _what_is_wrong(loss: Any, frozen: bool) -> str:
    if not isinstance(loss, Tensor):
        return f"loss is {type(loss).__name__}; expected a scalar tensor with a gradient (not its .item())"
    if loss.is_complex():
        return f"loss is a complex number ({loss.dtype}); expected a real one, such as its .abs() or .real"
    if frozen:
        return (
            "loss carries no gradient. Is it a loss of a model that accumulate() does not name? Name all that it "
            "trains: accumulate(first, second)."
        )
    return (
        "loss carries no gradient. Was it detached, computed under torch.no_grad(), or by a model without "
        "trainable parameters?"
    )
