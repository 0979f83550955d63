"""Where a NaN or an infinity first appears: in which module, at which parameter, on which rank, for which samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from strategies import collectives
from strategies.accumulation import Accumulation
from strategies.errors import NonfiniteError
from strategies.observer import Observer
from strategies.prepared.model import ModelLink
from strategies.prepared.optimizer import OptimizerLink
from strategies.sources import Cursor
from strategies.window import Window

from .module_trace import Check, ModuleTrace, Place, extremes, grade, unfinite

_PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Seen:
    """A check with what is known about when: the micro-batch of its window, and the batch that the loop held."""

    check: Check
    model: ModelLink | None  # `None` for the loss
    micro_batch: int
    cursor: Cursor | None
    batch: int


@dataclass(frozen=True)
class Finding:
    """The first value of one rank that is not finite, in words that travel to the others."""

    order: tuple[int, int]  # of the micro-batch and the phase: earlier ones first
    rank: int
    what: str
    model: int  # its number among the prepared models; -1 for the loss
    module: str
    data: str
    is_input: bool
    parameter: str | None = None


class NonfiniteSearch(Observer):
    """Raises `NonfiniteError` on every rank, with one message, where a value that is not finite first appears.

    What does not reach the loss or a gradient is not told: a mask of -inf, a forward whose output is thrown away. Ranks
    compare what they saw once per window, before the update, and once after it: two small collectives and two
    waits for the device per window. In float16, what forward or backward make of finite inputs and weights is an
    overflow while there is a loss scale above 1, which the scaler answers by skipping the step; a loss that finite
    outputs make NaN or infinite is not, because it is not scaled yet.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self._accumulation = accumulation
        self._seen: dict[Window | None, list[Seen]] = {}
        self._attached: dict[ModelLink, ModuleTrace] = {}
        self._cursor: Cursor | None = None
        self._stepped: set[OptimizerLink] = set()

    def attach(self) -> None:
        """Look into the models that were prepared since the last call."""
        for link in self._accumulation.models:
            if link not in self._attached:
                self._attached[link] = ModuleTrace(
                    link.original,
                    lambda check, link=link: self._note(check, link),  # type: ignore[misc]
                    lambda link=link: link in self._accumulation.models,  # type: ignore[misc]
                )

    # -- what the loop tells -------------------------------------------------------------------------------

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """Remember which samples the loop holds."""
        self._cursor = cursor

    def micro_batch_begun(self, window: Window) -> None:
        """Forget what was seen before a window: evaluation, say."""
        if window.count == 0:
            self._forget(window)

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """Look at the loss."""
        size = extremes(loss)
        if size is not None:
            self._note(Check("forward", _LOSS, size), None)

    def gradients_ready(self, optimizer: OptimizerLink) -> None:
        """Compare what all ranks saw in this window."""
        window = optimizer.window
        seen = [*self._seen.get(None, ()), *self._seen.get(window, ())]
        seen.sort(key=lambda one: one.micro_batch)
        self._forget(window)
        world = self._accumulation.world
        first, masked = _first(seen)
        if collectives.any_true(first is not None, world):
            self._raise_unless_overflow(self._finding(first, masked) if first is not None else None, window)
        elif optimizer not in self._stepped:  # later steps begin with what was looked at after the last one
            self._stepped.add(optimizer)
            self._raise_for_parameters(optimizer, f"before step {optimizer.num_steps + 1}", "")

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """Look at the parameters after the step."""
        if taken:
            rates = sorted({float(group["lr"]) for group in optimizer.original.param_groups if "lr" in group})
            also = f" (learning rate {', '.join(f'{rate:g}' for rate in rates)}), whose gradients were finite"
            self._raise_for_parameters(optimizer, f"in update, after step {optimizer.num_steps}", also)

    def raised(self, error: BaseException) -> None:
        """Forget the window that an exception ended."""
        self._seen.clear()

    # -- how -----------------------------------------------------------------------------------------------

    def _note(self, check: Check, link: ModelLink | None) -> None:
        window = self._accumulation.current
        micro_batch = window.count if window is not None else 0
        self._seen.setdefault(window, []).append(Seen(check, link, micro_batch, self._cursor, self._batch()))

    def _batch(self) -> int:
        return self._cursor.index if self._cursor is not None else -1

    def _forget(self, window: Window | None) -> None:
        self._seen.pop(window, None)
        self._seen.pop(None, None)

    def _raise_unless_overflow(self, mine: Finding | None, window: Window | None) -> None:
        """Name the first finding of all ranks, unless float16 explains it. Collective."""
        world = self._accumulation.world
        found = [one for one in collectives.all_gather_objects(mine, world) if one is not None]
        finding = min(found, key=lambda one: (one.order, one.rank))
        weights = self._unfinite_weights(finding)
        scale = window.scaler.current if window is not None and window.scaler is not None else None
        of_loss = finding.model < 0
        if scale is not None and scale > 1.0 and not weights and not finding.is_input and not of_loss:
            return  # the scaler skips this step and lowers the scale
        raise NonfiniteError(_message(finding, weights, scale))

    def _raise_for_parameters(self, optimizer: OptimizerLink, when: str, also: str) -> None:
        """Name the first parameter of the optimizer that is not finite on any rank. Collective."""
        world = self._accumulation.world
        bad = unfinite(_parameters_of(optimizer))
        if not collectives.any_true(bool(bad), world):
            return
        mine = (world.rank, bad[0], self._data(self._cursor, self._batch())) if bad else None
        rank, name, data = next(one for one in collectives.all_gather_objects(mine, world) if one is not None)
        raise NonfiniteError(
            f"a value that is not finite first appeared on rank {rank} {when} of {type(optimizer.original).__name__}: "
            f"parameter {name}{also}. Data: {data}."
        )

    def _finding(self, seen: Seen, masked: bool) -> Finding:
        check, models = seen.check, self._accumulation.models
        order = (seen.micro_batch, _PHASES.index(check.phase))
        data = self._data(seen.cursor, seen.batch)
        rank = self._accumulation.world.rank
        if seen.model is None:
            what = "in forward: the loss, computed from finite outputs of the model"
            return Finding(order, rank, what, -1, "", data, is_input=False)
        modules = dict(seen.model.original.named_modules())
        what, module, is_input = _words(check, seen.model, modules)
        what = (
            what.replace("whose inputs are finite", "whose inputs are finite but for -inf, as in a mask")
            if masked
            else what
        )
        return Finding(order, rank, what, models.index(seen.model), module, data, is_input, check.parameter)

    def _unfinite_weights(self, finding: Finding) -> list[str]:
        """Parameters and buffers of the module that is named, on any rank. Collective."""
        bad: list[str] = []
        if finding.model >= 0:
            module = self._accumulation.models[finding.model].original.get_submodule(finding.module)
            before = f"{finding.module}." if finding.module else ""
            bad = unfinite((before + name, value) for name, value in module.named_parameters(recurse=False))
            buffers = module.named_buffers(recurse=False)
            bad += unfinite(((before + name, value) for name, value in buffers), masks=True)
        everyone = collectives.all_gather_objects(bad, self._accumulation.world)
        return list(dict.fromkeys(name for names in everyone for name in names))

    def _data(self, cursor: Cursor | None, batch: int) -> str:
        if cursor is None:
            return "not from a prepared loader"
        loader: DataLoader[Any] | None = cursor.loader
        indices = loader._link.indices(cursor, batch) if loader is not None else None  # type: ignore[attr-defined]
        where = f"batch {batch} of epoch {cursor.epoch}"
        if indices is None:
            return where
        return f"{where}, samples {_short(indices)}" if indices else f"{where}, a repeated sample of no weight"


def _first(seen: Sequence[Seen]) -> tuple[Seen | None, bool]:
    """Where the first loss or gradient comes from that is not finite, and whether constants of -inf went in before.

    It is the first value of that micro-batch that is not finite, but for such constants.
    """
    graded = list(zip(seen, grade([one.check.size for one in seen]), strict=True))
    reached = next(
        (one for one, found in graded if found and (one.check.phase == "backward" or one.model is None)), None
    )
    if reached is None:
        return None, False
    there = [(one, found) for one, found in graded if found and one.micro_batch == reached.micro_batch]
    masked = False
    for one, found in there:
        if found > 1 or one.check.phase == "backward" or one.model is None or one.check.place.needs_gradient:
            return one, masked
        masked = True
    return reached, masked


_LOSS = Place(lambda: None, 0, None, "")  # type: ignore[arg-type]


def _parameters_of(optimizer: OptimizerLink) -> list[tuple[str, Tensor]]:
    """The parameters that the optimizer holds, with their names."""
    names = {}
    for link in optimizer.models:
        parameters = link.sharded_parameters or dict(link.original.named_parameters())
        names.update({id(parameter): f"{name} of {link.name}" for name, parameter in parameters.items()})
    return [(names[id(parameter)], parameter) for parameter in optimizer.parameters()]


def _words(check: Check, link: ModelLink, modules: Mapping[str, nn.Module]) -> tuple[str, str, bool]:
    """What was found, the module to blame, and whether it came in from outside the model."""
    place = check.place

    def named(name: str) -> str:
        return f"{name} ({type(modules[name]).__name__}) of {link.name}" if name else link.name

    if check.phase == "forward":
        if place.made_by is not None:
            return f"in forward: the output of {named(place.made_by)}, whose inputs are finite", place.made_by, False
        if place.used_by[:1] == [""]:
            return f"in forward: the inputs of {link.name}", "", True
        before = named(place.used_by[0])
        return f"in forward: {named(place.within)}, in its own code before it calls {before}", place.within, False
    if check.parameter is not None:
        module = place.used_by[0]
        return f"in backward: the gradient of parameter {check.parameter} in {named(module)}", module, False
    if place.used_by:
        return f"in backward: the gradient that {named(place.used_by[-1])} hands back", place.used_by[-1], False
    if place.made_by is not None and place.is_result:
        return f"in backward: the gradient of the loss with respect to the output of {link.name}", "", False
    return (
        f"in backward: {named(place.within)}, in its own code after it calls {named(place.made_by or '')}",
        place.within,
        False,
    )


def _message(finding: Finding, weights: Sequence[str], scale: float | None) -> str:
    also = f", where {', '.join(weights)} {'is' if len(weights) == 1 else 'are'} not finite" if weights else ""
    scaled = f" The float16 loss scale is {scale:g}." if scale is not None else ""
    return (
        f"a value that is not finite first appeared on rank {finding.rank} {finding.what}{also}. Micro-batch "
        f"{finding.order[0]} of its window. Data: {finding.data}.{scaled}"
    )


def _short(indices: Sequence[Any]) -> str:
    shown = ", ".join(str(index) for index in indices[:16])
    return f"[{shown}{f', and {len(indices) - 16} more' if len(indices) > 16 else ''}]"
