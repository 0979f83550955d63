"""Prepare objects of any kind, in any order: models first, then what holds their parameters, then the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..blocks import class_name
from ..errors import PrepareError
from ..process_group import named_failures
from .agreement import agreed_seed
from .alike import Fact, meet_alike
from .dataloader import prepare_dataloader
from .model import prepare_model
from .optimizer import prepare_optimizer
from .options import DataOptions
from .scheduler import prepare_scheduler
from .view import View

if TYPE_CHECKING:
    from ..accumulation import Accumulation


def prepare(
    objects: Sequence[Any],
    accumulation: Accumulation,
    *,
    seed: int | None,
    options: DataOptions | None = None,
    settings: Sequence[Fact] = (),
) -> list[Any]:
    """The prepared counterpart of each object, in the order given. Collective.

    `settings` are what all ranks must have alike. Raises, before anything is changed, `PrepareError` if an object is
    unknown, was prepared before or is not alike on all ranks, `ConfigurationError` if the settings are not.
    """
    kinds, options = [_kind(item) for item in objects], options or DataOptions()
    _refuse_repeated(objects, accumulation)
    meet_alike(objects, kinds, settings, accumulation.world)
    accumulation.forget_windows()
    held: tuple[list[Any], ...] = (
        accumulation.models,
        accumulation.optimizers,
        accumulation.schedulers,
        accumulation.loaders,
    )
    before = [items[:] for items in held]
    prepared: dict[int, Any] = {}
    try:
        with named_failures(accumulation.world):
            for index in _indices(kinds, "model"):
                prepared[index] = prepare_model(objects[index], accumulation)
            for index in _indices(kinds, "optimizer"):
                prepared[index] = prepare_optimizer(objects[index], accumulation)
            for index in _indices(kinds, "scheduler"):
                prepared[index] = prepare_scheduler(objects[index], accumulation)
            for index in _indices(kinds, "loader"):
                own_seed = agreed_seed(
                    objects[index],
                    seed,
                    len(accumulation.loaders),
                    accumulation.world,
                    dispatch=options.dispatch_batches,
                )
                prepared[index] = prepare_dataloader(objects[index], accumulation, options=options, seed=own_seed)
    except BaseException:
        for items, earlier in zip(held, before, strict=True):
            items[:] = earlier
        raise
    accumulation.given += objects
    return [prepared[index] for index in range(len(objects))]


def _indices(kinds: Sequence[str], wanted: str) -> list[int]:
    return [index for index, kind in enumerate(kinds) if kind == wanted]


def _kind(item: Any) -> str:
    if isinstance(item, nn.Module):
        return "model"
    if isinstance(item, Optimizer):
        return "optimizer"
    if isinstance(item, DataLoader):
        return "loader"
    if isinstance(getattr(item, "optimizer", None), Optimizer) and callable(getattr(item, "step", None)):
        return "scheduler"
    advice = ""
    if isinstance(item, torch.Tensor):
        advice = " Move tensors with tensor.to(accelerator.device)."
    elif hasattr(item, "__iter__"):
        advice = " Put data into a torch.utils.data.DataLoader."
    raise PrepareError(
        f"prepare() got {type(item).__name__} {item!r:.60}; expected torch modules, optimizers, learning-rate "
        f"schedulers (with .optimizer and .step) and DataLoaders.{advice}"
    )


def _refuse_repeated(objects: Sequence[Any], accumulation: Accumulation) -> None:
    for index, item in enumerate(objects):
        before = any(item is other for other in [*accumulation.given, *objects[:index]])
        if isinstance(item, View) or before:
            raise PrepareError(
                f"{class_name(item)} is prepared already. Prepare each object once, and use what prepare() returned."
            )
