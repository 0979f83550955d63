"""What the ranks of a job that waits say of themselves, put together for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["waits", "left", "stopped", "gone", "silent"]
MEANT_TO_WAIT = "main_process_first"


@dataclass(frozen=True)
class Report:
    """Where one rank is, as it last said: a `position.Position`, and `since` how many seconds it has been there.

    `called` is a collective that runs beside Python and has not ended.
    """

    rank: int
    where: str
    waits_in: str = ""
    brought: str = ""
    inside: str = ""
    called: str = ""
    since: float = 0.0
    state: State = "waits"
    host: str = ""
    pid: int = 0

    @property
    def place(self) -> str:
        """The line, with what was called there and has not ended."""
        return f"{self.where}, while {self.called} has not ended" if self.called else self.where


def is_worth_telling(reports: list[Report]) -> bool:
    """Whether ranks that do not move seem to wait in vain: in a call of which the others are not.

    A rank that is in the same call and in none of its collectives is busy there: it compiles, reads or writes. And
    `main_process_first` is there to wait.
    """
    waiting = [one for one in reports if one.state == "waits" and (one.waits_in or one.called)]
    waiting = [one for one in waiting if one.inside != MEANT_TO_WAIT]
    calls = {one.inside for one in waiting}
    others = [one for one in reports if one not in waiting]
    busy = [one for one in others if one.state == "waits" and one.inside and calls == {one.inside}]
    return bool(waiting) and (not others or len(busy) < len(others))


def verdict(reports: list[Report]) -> str:
    """Who waits where for whom, in one or two sentences."""
    waiting = [one for one in reports if one.state == "waits" and one.waits_in]
    elsewhere = [one for one in reports if one not in waiting]
    if waiting and elsewhere:
        return f"{_places(waiting)}. {'; '.join(_absent(one) for one in elsewhere)}."
    if not waiting:
        return f"{'; '.join(_absent(one) for one in reports)}."
    if len({(one.waits_in, one.where) for one in waiting}) > 1:
        return f"Ranks wait in different collectives: {_places(waiting)}."
    if len({one.brought for one in waiting}) > 1:
        brought = "; ".join(f"rank {one.rank}: {one.brought}" for one in waiting)
        return f"{_places(waiting)}, to which they brought different tensors ({brought})."
    return f"{_places(waiting)}, and none is missing: look at the network and the devices."


def table(reports: list[Report]) -> str:
    """One line per rank."""
    rows = [("rank", "waits in", "for", "at")]
    for one in reports:
        state = one.waits_in or "no collective" if one.state == "waits" else one.state
        brought = f" of {one.brought}" if one.brought else ""
        rows.append((str(one.rank), state + brought, f"{one.since:.0f} s", one.place))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _places(waiting: list[Report]) -> str:
    by_place: dict[tuple[str, str], list[int]] = {}
    for one in waiting:
        by_place.setdefault((one.waits_in, one.where), []).append(one.rank)
    return "; ".join(
        f"{'Ranks' if len(ranks) > 1 else 'Rank'} {', '.join(map(str, ranks))} wait{'' if len(ranks) > 1 else 's'} in "
        f"{waits_in} at {where}"
        for (waits_in, where), ranks in by_place.items()
    )


def _absent(one: Report) -> str:
    words: Mapping[str, str] = {
        "waits": f"is in no collective, at {one.place}",
        "left": f"left the job, at {one.where}",
        "stopped": f"is stopped (SIGSTOP, a debugger, or ctrl-z), last seen at {one.where}",
        "gone": f"is gone, last seen at {one.where}",
        "silent": f"does not answer, last seen at {one.where}",
    }
    return f"Rank {one.rank} {words[one.state]}"
