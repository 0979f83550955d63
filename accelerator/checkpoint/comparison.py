"""Two steps compared: that which followed a checkpoint, and the first one of a run that was resumed from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .fingerprint import Fingerprint


@dataclass(frozen=True)
class MicroBatch:
    """One backward on one rank: its batch, where that is known, its mean loss, and its weight in the window."""

    batch: Fingerprint | None
    loss: float
    weight: float


@dataclass(frozen=True)
class Step:
    """The micro-batches of every rank up to an optimizer step, and the norm of its gradients before clipping.

    `inside_window`: the window had begun before the checkpoint was written.
    """

    ranks: Sequence[Sequence[MicroBatch]]
    gradient_norm: float | None
    inside_window: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Step:
        """What `dataclasses.asdict` made of one. Raises `TypeError`, `KeyError` or `ValueError` for anything else."""
        ranks = [
            [
                MicroBatch(
                    None if one["batch"] is None else Fingerprint(**one["batch"]),
                    float(one["loss"]),
                    float(one["weight"]),
                )
                for one in of_rank
            ]
            for of_rank in body["ranks"]
        ]
        norm = body["gradient_norm"]
        return cls(ranks, None if norm is None else float(norm), bool(body["inside_window"]))

    @property
    def all(self) -> list[MicroBatch]:
        """Those of all ranks."""
        return [one for of_rank in self.ranks for one in of_rank]

    @property
    def mean_loss(self) -> float:
        """Over all that the window weighs."""
        total = sum(one.weight for one in self.all)
        return sum(one.weight * one.loss for one in self.all) / total if total else 0.0

    @property
    def samples(self) -> int | None:
        """Of all ranks; `None` where some batch is not known."""
        batches = [one.batch for one in self.all]
        return None if None in batches else sum(batch.samples for batch in batches if batch is not None)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found, in one word and in a sentence."""

    kind: Literal["exact", "rounding", "drift", "data", "not comparable"]
    text: str

    @property
    def is_wrong(self) -> bool:
        """Whether the resumed run does something else."""
        return self.kind in ("drift", "data")

    @property
    def is_good(self) -> bool:
        """Whether the resumed run does the same."""
        return self.kind in ("exact", "rounding")


def compare(then: Step, now: Step, *, same_place: bool, tolerance: float) -> Verdict:
    """Whether `now` is as `then` was: to the last bit in the same place, up to `tolerance` (relative) in another.

    A place is a strategy, a number of processes and a precision. In the same one each rank's micro-batches are
    compared; else what is the same however samples are dealt out: all of them together, their mean loss, the norm.
    """
    if same_place:
        return _compare_ranks(then, now)
    if then.inside_window:
        return Verdict("not comparable", "not comparable: saved inside an open window, and resumed in another place")
    known = then.samples is not None and now.samples is not None
    if known and then.samples != now.samples:
        return Verdict(
            "not comparable", f"not comparable: {now.samples} samples instead of {then.samples} up to the next update"
        )
    batches = [[one.batch for one in step.all if one.batch is not None] for step in (then, now)]
    totals = [sum(batch.total for batch in of_step) % 2**64 for of_step in batches]
    if known and totals[0] != totals[1]:
        if len({batch.shape for of_step in batches for batch in of_step if batch.samples}) > 1:
            return Verdict("not comparable", "not comparable: batches are padded, each to a length of its own")
        return Verdict("data", _wrong_data(*(of_step[0] for of_step in batches)))
    scale = max((abs(one.loss) for step in (then, now) for one in step.all if one.weight), default=0.0)
    drift = max(_apart(then.mean_loss, now.mean_loss, scale), _norms_apart(then, now))
    return _of_drift(drift, tolerance, _compared(then, now, data=known))


def _compare_ranks(then: Step, now: Step) -> Verdict:
    counts = [[len(of_rank) for of_rank in step.ranks] for step in (then, now)]
    if counts[0] != counts[1]:
        return Verdict(
            "not comparable",
            f"not comparable: {counts[1]} micro-batches on the ranks up to the next update instead of {counts[0]}",
        )
    pairs = list(zip(then.all, now.all, strict=True))
    unknown = False
    for one, two in pairs:
        if one.batch is None or two.batch is None:
            unknown = True
        elif one.batch.digest != two.batch.digest:
            return Verdict("data", _wrong_data(one.batch, two.batch))
    drift = max([_norms_apart(then, now), *(_apart(one.loss, two.loss) for one, two in pairs)])
    return _of_drift(drift, 0.0, _compared(then, now, data=not unknown))


def _compared(then: Step, now: Step, *, data: bool) -> str:
    """What there was to compare."""
    norm = then.gradient_norm is not None and now.gradient_norm is not None
    return ", ".join(["data"] * data + ["losses"] + ["gradient norm"] * norm)


def _of_drift(drift: float, tolerance: float, compared: str) -> Verdict:
    if drift == 0.0:
        return Verdict("exact", f"exact (compared: {compared})")
    if drift <= tolerance:
        return Verdict("rounding", f"the same up to rounding, {drift:.1e} apart (compared: {compared})")
    return Verdict("drift", f"drifted: {drift:.1e} apart, relative (compared: {compared})")


def _wrong_data(then: Fingerprint, now: Fingerprint) -> str:
    if (then.epoch, then.place) != (now.epoch, now.place):
        return (
            f"wrong data: the batch after position {now.place} of epoch {now.epoch} instead of that after position "
            f"{then.place} of epoch {then.epoch}"
        )
    return (
        f"wrong data: the batch after position {now.place} of epoch {now.epoch} has other contents. The dataset is "
        "another one, or it draws at random, which seed_samples=True makes the same"
    )


def _norms_apart(then: Step, now: Step) -> float:
    if then.gradient_norm is None or now.gradient_norm is None:
        return 0.0
    return _apart(then.gradient_norm, now.gradient_norm)


def _apart(one: float, two: float, scale: float = 0.0) -> float:
    """The difference relative to the larger, or to `scale`, of which both are sums; 0 if both are no number."""
    if one == two or (math.isnan(one) and math.isnan(two)):
        return 0.0
    difference = abs(one - two) / max(abs(one), abs(two), scale)
    return difference if math.isfinite(difference) else math.inf
