"""What a run left in its folder, put together from its log and the files of its timers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accelerator.lines import read_lines
from strategies.errors import StateError

Points = list[tuple[float, float]]


@dataclass
class RankData:
    """One rank: what its first line says, and a line for every second or so."""

    rank: int
    about: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def phases(self) -> dict[str, float]:
        """Seconds by phase over the whole run, and under `other` what no phase accounts for.

        On a CPU, where it is the host that waits, what backward did not hide of the exchange of gradients is
        `communication`, and no part of `closing_backward`.
        """
        total: dict[str, float] = {}
        for line in self.lines:
            for name, seconds in line["phases"].items():
                total[name] = total.get(name, 0.0) + seconds
        after = self.after_backward()
        if after is not None and self._waits_itself:
            total["communication"] = after
            total["closing_backward"] = total.get("closing_backward", 0.0) - after
        total["other"] = max(0.0, self.seconds - sum(total.values()))
        return total

    @property
    def seconds(self) -> float:
        """Measured seconds of the whole run."""
        return float(sum(line["seconds"] for line in self.lines))

    def exchanges(self) -> dict[int, tuple[int, float, float]]:
        """By the number of each model that was measured: in how many windows, and the means of `Exchange`'s seconds.

        A line has, for each model, the window that was measured last, which stands for all windows of that line.
        """
        measured: dict[int, list[tuple[int, list[float]]]] = {}
        for line in self.lines:
            for model, exchange in enumerate(line.get("exchanges", ()), 1):
                if exchange is not None:
                    measured.setdefault(model, []).append((line["windows"], exchange))
        found = {}
        for model, told in sorted(measured.items()):
            _, seconds, hidden = np.average([one for _, one in told], axis=0, weights=[1e-9 + many for many, _ in told])
            found[model] = len({tuple(one) for _, one in told}), float(seconds), float(hidden)
        return found

    def after_backward(self) -> float | None:
        """Seconds of the whole run in which gradients were exchanged with no backward beside it, as far as measured.

        `None` where none was, and for several models, which may have different windows. On a CPU it is a part of the
        closing backwards: the windows that were measured may have been slower than the others.
        """
        found = list(self.exchanges().values())
        if len(found) != 1:
            return None
        _, seconds, hidden = found[0]
        after = max(0.0, seconds - hidden) * sum(line["windows"] for line in self.lines)
        closing = sum(line["phases"].get("closing_backward", 0.0) for line in self.lines)
        return float(min(after, closing) if self._waits_itself else after)

    @property
    def _waits_itself(self) -> bool:
        """Whether the host waits for the exchange, and no device."""
        return bool(self.about.get("device") == "cpu")

    def exchange(self) -> float | None:
        """Share of the time in which closing backwards took longer than open ones; `None` without accumulation."""
        phases = self.phases()
        closing = sum(line["windows"] for line in self.lines)
        opened = sum(line["micro_batches"] for line in self.lines) - closing
        if not opened or not closing or not self.seconds:
            return None
        longer = phases.get("closing_backward", 0.0) / closing - phases.get("backward", 0.0) / opened
        return max(0.0, float(longer * closing / self.seconds))

    def peak_memory(self) -> dict[str, int]:
        """The largest of each kind, in bytes."""
        found: dict[str, int] = {}
        for line in self.lines:
            for name, size in line.get("memory", {}).items():
                found[name] = max(size, found.get(name, 0))
        return found


@dataclass
class RunData:
    """One run."""

    name: str
    folder: Path
    plan: list[list[str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Points] = field(default_factory=dict)
    ranks: list[RankData] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    flops_per_sample: float | None = None

    def throughput(self) -> Points:
        """Samples per second of all ranks together, by step."""
        each = [
            [(line["step"], line["samples"] / line["seconds"]) for line in rank.lines if line["samples"]]
            for rank in self.ranks
        ]
        each = [points for points in each if points]
        if not each:
            return []
        steps = [step for step, _ in each[0]]
        total = np.zeros(len(steps))
        for points in each:
            total += np.interp(steps, [step for step, _ in points], [rate for _, rate in points])
        return list(zip(steps, total.tolist(), strict=True))

    def samples_per_second(self) -> float | None:
        """The mean of it over the run, of all ranks together; `None` where no prepared loader counted them."""
        rates = [sum(line["samples"] for line in rank.lines) / rank.seconds for rank in self.ranks if rank.seconds]
        return float(sum(rates)) or None

    def memory(self) -> Points:
        """Bytes of the first rank by step: of its device if it has one, else resident."""
        lines = self.ranks[0].lines if self.ranks else []
        return [
            (line["step"], line["memory"].get("device", line["memory"].get("resident", 0)))
            for line in lines
            if line.get("memory")
        ]


def read_run(folder: Path) -> RunData:
    """The run in a folder. Raises `StateError` for one that holds neither a log nor timers."""
    log, timing = folder / "log.jsonl", sorted((folder / "timing").glob("rank*.jsonl"))
    timing = [path for path in timing if path.stem.removeprefix("rank").isdigit()]  # none that was moved aside
    if not log.exists() and not timing:
        raise StateError(
            f"{str(folder)!r} holds no run: expected log.jsonl or timing/rank0.jsonl, which "
            "Accelerator(project_dir=...) writes"
        )
    run = RunData(folder.resolve().name, folder)
    for line in read_lines(log):
        _take_logged(run, line)
    for path in sorted(timing, key=lambda path: int(path.stem.removeprefix("rank"))):
        rank = RankData(int(path.stem.removeprefix("rank")))
        for line in read_lines(path):
            _take_timed(run, rank, line)
        run.ranks.append(rank)
    _tell_restarts_once(run)
    _fill_in(run)
    run.events.sort(key=lambda event: event.get("time", 0))
    return run


def _take_logged(run: RunData, line: dict[str, Any]) -> None:
    if "config" in line:
        run.config.update(line["config"])
    elif "event" in line:
        run.events.append(line)
    for name, value in line.get("values", {}).items():
        number = _number(value)
        if number is not None:
            run.curves.setdefault(name, []).append((line["step"], number))


def _take_timed(run: RunData, rank: RankData, line: dict[str, Any]) -> None:
    if "run" in line:
        rank.about = line["run"]
    elif "plan" in line:
        run.plan = line["plan"]
    elif "flops" in line:
        if line["flops"]["samples"] and rank.rank == 0:
            run.flops_per_sample = line["flops"]["micro_batch"] / line["flops"]["samples"]
    elif "event" in line:
        if line["event"] != "resumed" or not any(event["event"] == "resumed" for event in run.events):
            run.events.append({**line, "rank": rank.rank})
    elif "phases" in line:
        rank.lines.append(line)


def _tell_restarts_once(run: RunData) -> None:
    """All processes start again together, and each says so: of equal restarts keep one, of no rank."""
    kept, told = [], set()
    seen: Counter[tuple[Any, ...]] = Counter()
    for event in run.events:
        if event["event"] == "restart":
            which = event.get("text"), seen[event["rank"], event.get("text")]  # a run that is taken up counts anew
            seen[event["rank"], event.get("text")] += 1
            if which in told:
                continue
            told.add(which)
            event = {name: value for name, value in event.items() if name != "rank"}
        kept.append(event)
    run.events = kept


def _fill_in(run: RunData) -> None:
    """Curves that the timers know too, where the script logs none of that name."""
    first = run.ranks[0].lines if run.ranks else []
    for name in ("loss", "grad_norm"):
        points = [(line["step"], _number(line[name])) for line in first if name in line]
        if name not in run.curves and points:
            run.curves[name] = [(step, value) for step, value in points if value is not None]
    if "lr" not in run.curves:
        for index in range(max((len(line.get("lr", ())) for line in first), default=0)):
            name = "lr" if index == 0 else f"lr of optimizer {index + 1}"
            run.curves[name] = [(line["step"], line["lr"][index]) for line in first if len(line["lr"]) > index]


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits, in the file of an older version
            return None
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return None
