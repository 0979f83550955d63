"""A rank that waits for ever: every rank says where it is, one prints the table, and all end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from strategies import World
from strategies.observer import Observer
from strategies.process_group import explain_lost_peer, shared_store

from .flight import pending
from .position import Waits, locate, signature, stack_of

if TYPE_CHECKING:
    from torch.distributed import Store

    from strategies.prepared.optimizer import OptimizerLink
    from strategies.sources import Cursor
    from strategies.window import Window

_ANSWER_SECONDS = 6.0  # torch takes some to tell what its flight recorder holds, and a full machine as long
_STORE_SECONDS = 3.0
State = Literal["waits", "left", "stopped", "gone", "silent"]


@dataclass(frozen=True)
class Report:
    """Where one rank is, as it last said. `since` is how long, in seconds, it has been there."""

    rank: int
    where: str
    waits_in: str = ""
    brought: str = ""
    since: float = 0.0
    state: State = "waits"
    host: str = ""
    pid: int = 0


class HangWatch(Observer):
    """A thread that looks at the thread it was made in, and ends the process when no rank has moved for too long.

    Moving is: an event of the loop, another instruction, a blocking call that ended (`position.Waits`), or, on a
    CPU, computing. Until the first optimizer step `first_step_timeout` seconds are allowed, then `timeout`. Each rank
    writes where it is into the job's store as it goes, so that the place of one that stops answering is known too, and
    into one key that it moved, which those that wait read. The first rank whose time is up asks all; those that live
    answer, the lowest of them prints the table, and all end with exit code 1. Not a collective.
    """

    def __init__(self, world: World, *, timeout: int, first_step_timeout: int) -> None:
        self._world = world
        self._limits = (first_step_timeout, timeout)
        self._watched = threading.get_ident()
        self._waits = Waits(threading.get_native_id() if world.device.type == "cpu" else None)
        self._events = 0
        self._stepped = False
        self._stop = threading.Event()
        self._store: Store | None = shared_store(_STORE_SECONDS) if world.size > 1 else None
        self._tell("at", self._report(0.0, detailed=False))
        self._thread = threading.Thread(target=self._watch, name="accelerator-hang-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, because this rank leaves; the others will find that it did."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(2 * _STORE_SECONDS)
        self._tell("at", replace(self._report(0.0, detailed=False), state="left"))

    # -- what the loop tells: that it moves -----------------------------------------------------------------

    def batch_wanted(self, loader: DataLoader[object]) -> None:
        """The loop moves."""
        self._events += 1

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """The loop moves."""
        self._events += 1

    def micro_batch_begun(self, window: Window) -> None:
        """The loop moves."""
        self._events += 1

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """The loop moves."""
        self._events += 1

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """The loop moves, and has begun."""
        self._events += 1
        self._stepped = True

    # -- the thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        interval = min(max(min(self._limits) / 8, 0.1), 2.0)
        last, moves, heard = self._seen(), 0, ""
        since = alive = time.monotonic()  # when this rank, and when any, was last seen to move
        used = self._seconds_used()
        while True:
            moved = self._moves_within(interval, last)
            if self._stop.is_set():
                return
            now, last = time.monotonic(), self._seen()
            computed = self._seconds_used() - used
            used += computed
            if moved or computed > 0.1 * interval:
                since = alive = now
                moves += 1
                heard = f"{self._world.rank} {moves}"
                self._put("moved", heard)
            elif (said := self._read("moved")) != heard:
                alive, heard = now, said
            self._tell("at", self._report(now - since, detailed=False))
            late = now - alive > self._limits[self._stepped]
            if not late and not self._has("asked"):
                continue
            if self._stop.is_set():
                return
            self._tell("asked", None)
            self._end(self._report(now - since, detailed=True))

    def _moves_within(self, interval: float, last: object) -> bool:
        """Look for `interval` seconds whether the thread is where it was; often, since it may return there each time.

        Looks are at random moments, and end with the first that finds it elsewhere: one that moves is seldom disturbed.
        """
        end, moved = time.monotonic() + interval, False
        while (left := end - time.monotonic()) > 0:
            if self._stop.wait(left if moved else min(left, random.uniform(0.01, 0.05))):
                break
            moved = moved or self._seen() != last
        return moved

    def _seen(self) -> object:
        """What stays the same as long as the thread does not move."""
        frames = stack_of(self._watched)  # not kept: they hold the tensors of the loop
        if any(frame.f_code is explain_lost_peer.__code__ for frame in frames):
            return object()  # ends by itself
        return self._events, signature(frames), self._waits.ended(frames)

    def _seconds_used(self) -> float:
        """Of the processor, by the watched thread. Not known with an accelerator, whose driver waits by turning."""
        clock = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
        return time.clock_gettime(clock(self._watched)) if clock and self._world.device.type == "cpu" else 0.0

    def _report(self, seconds: float, *, detailed: bool) -> Report:
        position = locate(stack_of(self._watched), detailed=detailed)
        if detailed and not position.waits_in and (called := pending()):
            position = replace(position, where=f"{position.where}, while {called} has not ended")
        host, pid = socket.gethostname(), os.getpid()
        return Report(self._world.rank, **asdict(position), since=round(seconds, 1), host=host, pid=pid)

    def _end(self, mine: Report) -> None:
        self._tell("is", mine)
        reports = self._collect(mine)
        limit = self._limits[self._stepped]
        told = f"HangError: no progress for {limit} s. {verdict(list(reports.values()))}"
        answered = [rank for rank, report in reports.items() if report.state == "waits"]
        leads = mine.rank == min(answered)
        if leads:
            os.write(2, f"{told}\n{table(list(reports.values()))}\n".encode())
        _record(told, table(list(reports.values())), leads=leads)
        if leads:
            self._tell("printed", None)
        else:
            self._until(lambda: self._has("printed"), 2.0)
        flushing = threading.Thread(target=_flush, daemon=True)  # the watched thread may hold a stream's lock
        flushing.start()
        flushing.join(1.0)
        for child in multiprocessing.active_children():
            if child.daemon:  # a DataLoader's worker, which would live on; an interpreter that exits ends them, too
                child.kill()
        os._exit(1)

    def _collect(self, mine: Report) -> dict[int, Report]:
        """What every rank says; of those that do not answer, what they said last."""
        reports = {mine.rank: mine}
        others = [rank for rank in range(self._world.size) if rank != mine.rank]
        self._until(lambda: all(self._has(f"is/{rank}") or self._is_away(rank) for rank in others), _ANSWER_SECONDS)
        for rank in others:
            answer = self._get(f"is/{rank}")
            reports[rank] = answer if answer is not None else _missing(rank, self._get(f"at/{rank}"))
        return dict(sorted(reports.items()))

    def _is_away(self, rank: int) -> bool:
        last = self._get(f"at/{rank}")
        return last is not None and _missing(rank, last).state != "silent"

    # -- the store: lost with its host, in which case this rank is on its own ---------------------------------

    def _tell(self, what: str, report: Report | None) -> None:
        key = what + (f"/{report.rank}" if report is not None else "")
        self._put(key, json.dumps(asdict(report)) if report is not None else "1")

    def _put(self, what: str, text: str) -> None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"accelerator/hang/{what}", text)

    def _has(self, what: str) -> bool:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                return bool(self._store.check([f"accelerator/hang/{what}"]))
        return False

    def _get(self, what: str) -> Report | None:
        found = self._read(what)
        return Report(**json.loads(found)) if found else None

    def _read(self, what: str) -> str:
        """What a key holds; empty if nothing, or if the store is lost."""
        if self._store is not None and self._has(what):
            with contextlib.suppress(RuntimeError):
                return bytes(self._store.get(f"accelerator/hang/{what}")).decode()
        return ""

    def _until(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.05)


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
        rows.append((str(one.rank), state + brought, f"{one.since:.0f} s", one.where))
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
        "waits": f"is in no collective, at {one.where}",
        "left": f"left the job, at {one.where}",
        "stopped": f"is stopped (SIGSTOP, a debugger, or ctrl-z), last seen at {one.where}",
        "gone": f"is gone, last seen at {one.where}",
        "silent": f"does not answer, last seen at {one.where}",
    }
    return f"Rank {one.rank} {words[one.state]}"


def _missing(rank: int, last: Report | None) -> Report:
    """A rank that does not answer, by what it said last and by what this machine knows of its process."""
    if last is None:
        return Report(rank, "an unknown place: it has not joined", state="silent")
    if last.state == "left":
        return last
    state: State = "silent"
    if last.host == socket.gethostname():
        try:
            status = Path(f"/proc/{last.pid}/stat").read_text().rpartition(")")[2].split()[0]
            state = "stopped" if status in "Tt" else "gone" if status in "ZX" else "silent"
        except OSError:
            state = "gone" if Path("/proc/self/stat").exists() else "silent"
    return replace(last, state=state)


def _record(told: str, listed: str, *, leads: bool) -> None:
    """Leave the error where torch's elastic agent looks for it; those that do not print only follow."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = time.time_ns()
    extra: dict[str, Any] = {"py_callstack": f"{told}\n{listed}\n", "timestamp": str(now // 10**9)}
    extra |= {"timestamp_ns": now, "follow_up": not leads}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": told, "extraInfo": extra}}))
        if leads:
            (Path(path).parent.parent / "printed").touch()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
