"""Which checkpoints are deleted after a new one is in place, and which of them training has proved good."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from strategies.errors import ConfigurationError, StateError
from strategies.observer import Observer

from . import folder as folders

if TYPE_CHECKING:
    from strategies.prepared.optimizer import OptimizerLink
    from strategies.window import Window

_HEALTHY = ".healthy"


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What to keep: the `last` ones, those of every so many steps, and the best one by a metric given when saving.

    Whatever these say, the newest stays that was followed by `healthy_after` steps of finite loss. Without any of the
    first three nothing is deleted.
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, Literal["min", "max"]] | None = None
    healthy_after: int = 10

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every), ("healthy_after", self.healthy_after)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"keep_{name} is {value!r}; expected a number >= 1".replace("keep_h", "h"))
        best = self.best
        if best is not None and (len(best) != 2 or best[1] not in ("min", "max")):
            raise ConfigurationError(
                f"keep_best is {best!r}; expected a metric and 'min' or 'max': ('val_loss', 'min')"
            )

    @property
    def deletes(self) -> bool:
        """Whether anything may be deleted."""
        return any(value is not None for value in (self.last, self.every, self.best))


@dataclass(frozen=True)
class Verdict:
    """Checkpoints that enough updates of finite loss have followed; and, in order, those not known yet to be so."""

    good: frozenset[str] = frozenset()
    waiting: tuple[str, ...] = ()


@dataclass
class _Waiting:
    """A checkpoint that is not judged yet: the updates before it, and the first bad one between it and the next."""

    name: str
    before: int
    first_bad: Tensor | None = None


class Health(Observer):
    """Counts updates, and notes on the device, without waiting for it, which was the first with a loss not finite."""

    def __init__(self) -> None:
        self._num_updates = 0
        self._losses: Tensor | None = None  # of the window at hand; their sum is finite if all of them are
        self._waiting: list[_Waiting] = []

    def backward_ended(self, window: Window, loss: Tensor) -> None:
        """Add the loss to those of its window."""
        loss = loss.detach().float().reshape(())
        self._losses = loss if self._losses is None else self._losses + loss

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """Look at the window's losses."""
        if not taken or self._losses is None:
            return
        self._num_updates += 1
        if self._waiting:
            newest = self._waiting[-1]
            now = torch.full_like(self._losses, self._num_updates)
            never = torch.full_like(self._losses, torch.inf)
            bad = torch.where(self._losses.isfinite(), never, now)
            newest.first_bad = bad if newest.first_bad is None else torch.minimum(newest.first_bad, bad)
        self._losses = None

    def saved(self, name: str) -> None:
        """A checkpoint was written: what follows tells whether it is good, and not whether one is that it replaced."""
        for replaced in self._waiting:
            replaced.name = replaced.name if replaced.name != name else ""
        self._waiting.append(_Waiting(name, self._num_updates))

    def loaded(self, name: str) -> None:
        """The run goes on from this one: what follows says nothing of others."""
        self._waiting = [_Waiting(name, self._num_updates)]

    def judge(self, steps: int) -> Verdict:
        """Look at what followed each checkpoint on this rank. Waits for the device."""
        good, waiting = [], []
        first_bad = float("inf")
        for one in reversed(self._waiting):
            first_bad = min(first_bad, float(one.first_bad) if one.first_bad is not None else first_bad)
            if first_bad - one.before <= steps:
                continue
            if self._num_updates - one.before >= steps:
                good.append(one.name)
            else:
                waiting.append(one)
        self._waiting = waiting[::-1]
        return Verdict(frozenset(good) - {""}, tuple(one.name for one in self._waiting if one.name))


def delete(newest: Path, keep: Keep, verdict: Verdict) -> None:
    """Delete beside `newest` what `keep` does not name, and note which are good. One rank calls it.

    The oldest one of which it is not known yet stays, too, so that one is known in the end, however few are kept. Only
    checkpoints that look whole, of this run and those that it went on from, are counted, and only those are deleted.
    One that holds a file of the user's stays.
    """
    parent = newest.parent
    runs = folders.read_manifest(newest).get("lineage", [])
    whole: list[tuple[Path, int, Any]] = []
    for path in folders.newest_first(parent):
        with_manifest = _manifest_if_whole(path)
        if with_manifest is not None:
            whole.append((path, folders.step_of(path) or 0, with_manifest))
    digests = {path.name: folders.digest_of(body) for path, _, body in whole}
    known = _note_good(parent, verdict.good - {newest.name}, digests)  # what had its name before was judged
    whole = [one for one in whole if one[2].get("run") in runs]
    kept = {path for path, _, _ in whole[: keep.last or 1]}
    kept |= {path for path, step, _ in whole if keep.every is not None and step % keep.every == 0}
    kept |= set([path for path, _, _ in whole if path.name in known][:1])
    kept |= set([path for path, _, _ in whole if path.name in verdict.waiting][-1:])
    if keep.best is not None:
        name, way = keep.best
        measured = [(body["metrics"][name], path) for path, _, body in whole if name in body.get("metrics", {})]
        if measured:
            kept.add((min if way == "min" else max)(measured, key=lambda pair: pair[0])[1])
    for path, _, _ in reversed(whole):
        if path not in kept and not folders.foreign_in(path)[1]:
            folders.remove(path)


def _manifest_if_whole(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files have their sizes; reading them all would take as long as saving."""
    try:
        manifest = folders.read_manifest(path)
        sizes = all((path / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())
    except (OSError, StateError):
        return None
    return manifest if sizes else None


def _note_good(parent: Path, good: Iterable[str], digests: Mapping[str, str]) -> set[str]:
    """Checkpoints known to be good, in this run and the ones before it; noted by digest, since names are used again."""
    path = parent / _HEALTHY
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        before = {}
    known = {name: digest for name, digest in digests.items() if name in good or before.get(name) == digest}
    if known != before:
        temporary = parent / f"{_HEALTHY}.new"
        temporary.write_text(json.dumps(known))
        os.replace(temporary, path)
    return set(known)
