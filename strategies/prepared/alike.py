"""Whether all ranks prepare the same, under the same settings: one digest compared, and what differs named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import collectives
from ..errors import AcceleratorError, ConfigurationError, PrepareError
from ..world import World


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on all ranks: its name, its value as text, and where a setting came from."""

    name: str
    value: str
    origin: str = ""

    @classmethod
    def of(cls, name: str, value: Any, origin: str = "") -> Fact:
        """The fact that `name` is `value`, without what ranks differ in by right: the number of a device."""
        text = str(value).partition(":")[0] if name.rpartition(".")[2] == "device" else _plain(value)
        return cls(name, text, origin)

    def __str__(self) -> str:
        return f"{self.value} ({self.origin})" if self.origin else self.value


def meet_alike(objects: Sequence[Any], kinds: Sequence[str], settings: Sequence[Fact], world: World) -> None:
    """Return once all ranks prepare `objects` of these `kinds` alike, under `settings` that are alike. Collective.

    Raises `ConfigurationError` or `PrepareError`, on every rank, naming what differs and what each rank has.
    """
    if world.size == 1:
        return
    facts = [Fact("what is prepared", ", ".join(kinds)), *_facts(objects, kinds)]
    _compare(settings, facts, world)


def _compare(settings: Sequence[Fact], facts: Sequence[Fact], world: World) -> None:
    brought = [(fact.name, fact.value) for fact in (*settings, *facts)]
    digests = collectives.meet("prepare", world, collectives.digest_of(repr(brought)))
    if all(digest == digests[0] for digest in digests):
        return
    everyone = collectives.all_gather_objects((settings, facts), world)
    _refuse([one for one, _ in everyone], ConfigurationError, "Give every rank the same settings.")
    _refuse([one for _, one in everyone], PrepareError, "Build and prepare the same objects on every rank.")
    raise PrepareError(
        "ranks prepared models with the same parameters in another order. Build them alike on every rank."
    )


def _refuse(of_ranks: Sequence[Sequence[Fact]], error: type[AcceleratorError], advice: str) -> None:
    """Raise `error` for the first fact that ranks differ in; the next ones are often its consequences."""
    by_name = [{fact.name: fact for fact in facts} for facts in of_ranks]
    for name in dict.fromkeys(fact.name for facts in of_ranks for fact in facts):
        held: dict[tuple[str, str], list[int]] = {}
        for rank, facts in enumerate(by_name):
            fact = facts.get(name)
            held.setdefault((fact.value, str(fact)) if fact is not None else ("", "nothing"), []).append(rank)
        if len({value for value, _ in held}) > 1:
            told = "; ".join(
                f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {words}"
                for (_, words), ranks in held.items()
            )
            raise error(f"{name} differs between ranks ({told}), which would train apart or wait for ever. {advice}")


def _facts(objects: Sequence[Any], kinds: Sequence[str]) -> Iterator[Fact]:
    describe: Mapping[str, Callable[[Any, str], Iterator[Fact]]] = {"model": _model, "optimizer": _optimizer}
    ordinals = dict.fromkeys(kinds, 0)
    for item, kind in zip(objects, kinds, strict=True):
        yield from describe.get(kind, _by_class)(item, f"{kind} {ordinals[kind]}")
        ordinals[kind] += 1


def _model(model: nn.Module, name: str) -> Iterator[Fact]:
    parameters = dict(model.named_parameters())
    yield Fact(name, f"{type(model).__name__} of {len(parameters)} parameters")
    for label, parameter in parameters.items():
        shape = "of no shape yet" if is_lazy(parameter) else tuple(parameter.shape)
        frozen = "" if parameter.requires_grad else ", frozen"
        yield Fact(f"{name} {label}", f"{shape} {_plain(parameter.dtype)}{frozen}")


def _optimizer(optimizer: Optimizer, name: str) -> Iterator[Fact]:
    yield Fact(name, type(optimizer).__name__)
    for index, group in enumerate(optimizer.param_groups):
        for option, value in group.items():
            if option == "params":
                yield Fact(f"{name} group {index}", f"{len(value)} parameters")
            elif option != "param_names":
                yield Fact(f"{name} group {index} {option}", _plain(value))


def _by_class(item: Any, name: str) -> Iterator[Fact]:
    """Of a scheduler, and of a loader, whose contents are compared where it is prepared."""
    yield Fact(name, type(item).__name__)


def _plain(value: Any) -> str:
    """`value` as text that is the same on all ranks where the value is: no address, no order of a set."""
    if value is None or isinstance(value, bool | int | float | str | complex):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return str(value.item()) if value.numel() == 1 and not value.is_meta else f"a tensor of {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_plain(key)}: {_plain(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_plain, value)))}}}"
    named = value if isinstance(value, type | FunctionType | MethodType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
