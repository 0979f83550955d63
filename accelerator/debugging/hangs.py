"""Ranks that wait in vain: one tells where each of them is, and where that was asked for, all end."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader

from strategies.accumulation import Accumulation
from strategies.observer import Observer
from strategies.process_group import collectives_called, explain_lost_peer, shared_store

from .flight import pending
from .hang_table import Report, State, is_worth_telling, table, verdict
from .position import FOR_A_WORKER, Waits, locate, signature, stack_of
from .workers import Workers

if TYPE_CHECKING:
    from torch.distributed import Store

    from strategies.prepared.optimizer import OptimizerLink
    from strategies.sources import Cursor
    from strategies.window import Window

_ANSWER_SECONDS = 6.0  # torch takes some to tell what its flight recorder holds, and a full machine as long
_STORE_SECONDS = 3.0
_LOOK_SECONDS = 1.0  # of an interval without limits, in which it looks again where nothing seemed to move
_moments = random.Random()  # not those of the script, whose draws a seed decides
_log = logging.getLogger("accelerator")


class HangWatch(Observer):
    """A thread that looks at the thread it was made in, and tells of ranks that wait; it may end the process, too.

    Moving is: an event of the loop, another instruction, a blocking call that ended (`position.Waits`), or, on a
    CPU, computing. Each rank writes where it is into the job's store as it goes, so that the place of one that stops
    answering is known too, and into one key that it moved, which those that wait read.

    Where no rank has moved for `notice` seconds (0: never), and some wait in a call that others are not in, one rank
    logs the table, once for each such wait; it costs the loop nothing. With `timeout`, the loop is observed, looks are
    frequent, and the first rank whose time is up asks all; those that live answer, the lowest of them prints the table,
    and all end with exit code 1. Until the first optimizer step `first_step_timeout` seconds are allowed.
    Not a collective.
    """

    def __init__(
        self, accumulation: Accumulation, *, notice: int, timeout: int | None = None, first_step_timeout: int = 0
    ) -> None:
        world = accumulation.world
        self._accumulation = accumulation
        self._world = world
        self._notice_after = notice if world.size > 1 and notice else float("inf")
        self._limits = (first_step_timeout, timeout) if timeout is not None else None
        self._watched = threading.get_ident()
        self._waits = Waits(threading.get_native_id() if world.device.type == "cpu" else None)
        self._events = 0
        self._stepped = False
        self._stop = threading.Event()
        self._store: Store | None = None
        self._workers: Workers | None = None
        if self._limits is not None:
            self._workers = Workers()
            self._connect()
        self._thread = threading.Thread(target=self._watch, name="accelerator-hang-watch", daemon=True)
        self._thread.start()

    @property
    def ends(self) -> bool:
        """Whether it ends a job that does not move, for which it observes the loop."""
        return self._limits is not None

    def stop(self) -> None:
        """Stop watching, because this rank leaves; the others will find that it did."""
        if self._stop.is_set():
            return
        self._stop.set()
        if threading.current_thread() is not self._thread:  # in which an Accelerator that was dropped may be collected
            self._thread.join(2 * _STORE_SECONDS)
        if self._workers is not None:
            self._workers.close()
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
        if self._limits is not None:
            interval, least = min(max(min(self._limits) / 8, 0.1), 2.0), 0.1
        else:
            interval, least = self._notice_after / 4, 0.01
        # Not yet looked: frames hold what their functions do, and an Accelerator that is dropped as soon as it is made
        # would end in this thread.
        last: object = None
        moves, heard, told = 0, "", ""
        since = alive = time.monotonic()  # when this rank, and when any, was last seen to move
        used = self._seconds_used()
        while True:
            moved = self._moves_within(interval, last)
            if self._stop.is_set() or not self._connect():
                return
            now, last = time.monotonic(), self._seen()
            computed = self._seconds_used() - used
            used += computed
            if moved or computed > least * interval:
                since = alive = now
                moves += 1
                heard = f"{self._world.rank} {moves}"
                self._put("moved", heard)
            elif (said := self._read("moved")) != heard:
                alive, heard = now, said
            quiet = now - alive
            self._tell(
                "at", self._report(now - since, detailed=heard != told and quiet > self._notice_after - interval)
            )
            if heard != told and quiet > self._notice_after and self._notice(heard, round(quiet / interval)):
                told = heard
            if self._limits is None or (quiet <= self._limits[self._stepped] and not self._has("asked")):
                continue
            if self._stop.is_set():
                return
            self._tell("asked", None)
            self._end(self._with_workers(self._report(now - since, detailed=True)), self._limits[self._stepped])

    def _moves_within(self, interval: float, last: object) -> bool:
        """Look for `interval` seconds whether the thread is where it was; often, since it may return there each time.

        Looks are at random moments, and end with the first that finds it elsewhere: one that moves is seldom disturbed.
        Without limits they begin shortly before the end.
        """
        end, moved = time.monotonic() + interval, False
        if self._limits is None:
            self._stop.wait(interval - _LOOK_SECONDS)
        while (left := end - time.monotonic()) > 0:
            if self._stop.wait(left if moved else min(left, _moments.uniform(0.01, 0.05))):
                break
            moved = moved or self._seen() != last
        return moved

    def _notice(self, heard: str, turn: int) -> bool:
        """Log the table, unless another rank does, or they wait for what is long; whether it was told.

        `heard` is the last move of any rank, the same on all: it names the wait. At each `turn` one rank asks.
        """
        if self._has(f"told/{heard}"):
            return True
        if not self._is_first(f"turn/{heard}/{turn}"):
            return False
        reports = [self._last_of(rank) for rank in range(self._world.size)]
        if not is_worth_telling(reports) or not self._is_first(f"told/{heard}"):
            return False
        _log.warning(
            "no rank has moved for %d s; they go on waiting. %s\n%s\n"
            "hang_timeout=%d would end the job where this lasts; hang_notice=0 says nothing.",
            self._notice_after,
            verdict(reports),
            table(reports),
            2 * self._notice_after,
        )
        return True

    def _last_of(self, rank: int) -> Report:
        """What a rank said last, unless its process is known to do nothing."""
        last = self._get(f"at/{rank}")
        now = _missing(rank, last)
        return last if last is not None and now.state == "silent" else now

    def _seen(self) -> object:
        """What stays the same as long as the thread does not move."""
        frames = stack_of(self._watched)  # not kept: they hold the tensors of the loop
        if any(frame.f_code is explain_lost_peer.__code__ for frame in frames):
            return object()  # ends by itself
        moves = self._events, self._accumulation.moves, collectives_called()
        return moves, signature(frames), self._waits.ended(frames)

    def _seconds_used(self) -> float:
        """Of the processor, by the watched thread. Not known with an accelerator, whose driver waits by turning."""
        clock = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
        return time.clock_gettime(clock(self._watched)) if clock and self._world.device.type == "cpu" else 0.0

    def _report(self, seconds: float, *, detailed: bool) -> Report:
        position = locate(stack_of(self._watched), detailed=detailed)
        called = pending() if detailed and not position.waits_in else ""
        host, pid = socket.gethostname(), os.getpid()
        return Report(self._world.rank, **asdict(position), called=called, since=round(seconds, 1), host=host, pid=pid)

    def _with_workers(self, mine: Report) -> Report:
        """`mine`, with the places of the workers that this rank waits for. Those that do not answer end by it."""
        places = self._workers.places() if self._workers is not None and mine.where.endswith(FOR_A_WORKER) else ""
        return replace(mine, where=f"{mine.where}, which is at {places}") if places else mine

    def _end(self, mine: Report, limit: int) -> None:
        self._tell("is", mine)
        reports = self._collect(mine)
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

    def _connect(self) -> bool:
        """Have a connection to the store of a job of several; whether there is one to have."""
        if self._store is None and self._world.size > 1:
            with contextlib.suppress(RuntimeError, ValueError):  # the group was left
                self._store = shared_store(_STORE_SECONDS)
                self._tell("at", self._report(0.0, detailed=False))
        return self._store is not None or self._world.size == 1

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

    def _is_first(self, what: str) -> bool:
        """Whether no rank has asked so before."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                return int(self._store.add(f"accelerator/hang/{what}", 1)) == 1
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
