"""The page: sections of text, tables and charts, with its style in it and nothing else to load."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from html import escape

from .read import RunData
from .style import STYLE
from .svg import line_chart, number, stacked_bars

PHASES = (
    *("data", "forward", "backward", "closing_backward", "communication", "reduce", "clip", "optimizer", "checkpoint"),
    *("collectives", "other"),
)
MOST_EVENTS = 200


def page(runs: Sequence[RunData], *, peak_tflops: float | None = None) -> str:
    """A whole HTML document about these runs. `peak_tflops`: of one device, for the utilisation."""
    names = _names(runs)
    title = ", ".join(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        _legend(names) if len(runs) > 1 else "",
        _section("Summary", _summary(runs, names, peak_tflops)),
        _section("Curves", _curves(runs, names)),
        _section("Time", _time(runs, names)),
        _section("Memory", _memory(runs, names)),
        _section("Plan", _plan(runs, names)),
        _section("Checkpoints", _events(runs, names, only="checkpoint")),
        _section("Events", _events(runs, names, without="checkpoint")),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """Names of folders; whole paths where two are the same."""
    short = [run.name for run in runs]
    return [run.name if short.count(run.name) == 1 else str(run.folder) for run in runs]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content or '<p class=none>nothing was recorded</p>'}</section>\n"


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<li><i class="s{index % 6}"></i>{escape(name)}</li>' for index, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(runs: Sequence[RunData], names: Sequence[str], peak_tflops: float | None) -> str:
    rows: list[list[str]] = [
        ["optimizer steps", *(_last_step(run) for run in runs)],
        ["processes", *(str(run.ranks[0].about.get("size", "")) if run.ranks else "" for run in runs)],
        ["device", *(str(run.ranks[0].about.get("device", "")) if run.ranks else "" for run in runs)],
        ["measured time", *(_duration(run.ranks[0].seconds) if run.ranks else "" for run in runs)],
        ["samples per second", *(_shown(run.samples_per_second()) for run in runs)],
    ]
    words = ""
    if any(run.flops_per_sample for run in runs):
        rate = [
            run.flops_per_sample * (run.samples_per_second() or 0) if run.flops_per_sample else None for run in runs
        ]
        rows.append(["model FLOP/s, all processes", *(_shown(value) for value in rate)])
        words = "FLOPs: counted by torch.utils.flop_counter in forward and backward of the first micro-batch. "
        if peak_tflops is not None:
            shares = [
                f"{value / (peak_tflops * 1e12 * len(run.ranks)):.1%}" if value and run.ranks else ""
                for value, run in zip(rate, runs, strict=True)
            ]
            rows.append(["model FLOPs utilisation", *shares])
            words += f"Utilisation: of {peak_tflops:g} TFLOP/s per process."
        else:
            words += "For the utilisation, give --peak-tflops, what one device can do."
    else:
        words = "FLOPs were not counted: Accelerator(count_flops=True) counts them in the first micro-batch."
    return _table(["", *names], rows) + f'<p class="note">{words}</p>'


def _last_step(run: RunData) -> str:
    steps = [line["step"] for rank in run.ranks for line in rank.lines]
    steps += [int(points[-1][0]) for points in run.curves.values() if points]
    return f"{max(steps):,}" if steps else ""


def _shown(value: float | None) -> str:
    return number(value) if value is not None else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else str(datetime.timedelta(seconds=round(seconds)))


def _figure(title: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> str:
    found = list(dict.fromkeys(name for run in runs for name in run.curves))
    first = [name for name in ("loss", "lr", "grad_norm") if name in found]
    figures = []
    for curve in [*first, *(name for name in found if name not in first)]:
        series = {name: run.curves[curve] for name, run in zip(names, runs, strict=True) if curve in run.curves}
        figures.append(_figure(curve, line_chart(_aligned(series, names))))
    speed = {name: points for name, run in zip(names, runs, strict=True) if (points := run.throughput())}
    if speed:
        figures.append(_figure("samples per second", line_chart(_aligned(speed, names))))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _aligned(
    series: dict[str, list[tuple[float, float]]], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """All runs in their order, so that each keeps its colour; without points where a run has none."""
    return {name: series.get(name, []) for name in names}


def _time(runs: Sequence[RunData], names: Sequence[str]) -> str:
    rows = {}
    for name, run in zip(names, runs, strict=True):
        for rank in run.ranks:
            if rank.lines:
                rows[f"{name}, rank {rank.rank}" if len(runs) > 1 else f"rank {rank.rank}"] = rank.phases()
    if not rows:
        return ""
    used = [phase for phase in PHASES if any(values.get(phase, 0) > 0 for values in rows.values())]
    legend = "".join(f'<li><i class="p{PHASES.index(phase)}"></i>{phase.replace("_", " ")}</li>' for phase in used)
    shares = [
        [
            name,
            *(f"{values.get(phase, 0) / sum(values.values()):.1%}" if sum(values.values()) else "" for phase in used),
        ]
        for name, values in rows.items()
    ]
    note = "Seconds of the host. On a device that runs behind it, a phase shows where the host waited."
    bars = stacked_bars(rows, PHASES)
    table = _table(["", *(phase.replace("_", " ") for phase in used)], shares)
    return f'<ul class="legend">{legend}</ul>{bars}{table}<p class="note">{note}</p>{_exchange(runs, names)}'


def _exchange(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The exchange of gradients, as torch measured it, or else by what closing backwards took longer."""
    rows, notes = [], []
    for name, run in zip(names, runs, strict=True):
        prefix = f"{name}: " if len(runs) > 1 else ""
        if len(run.ranks) < 2:
            continue
        for rank in run.ranks:
            measured, after = rank.exchanges(), rank.after_backward()
            for model, (windows, seconds, hidden) in measured.items():
                who = f"{prefix}rank {rank.rank}" + (f", model {model}" if len(measured) > 1 else "")
                times = (f"{value * 1e3:.2f} ms" for value in (seconds, hidden, max(0.0, seconds - hidden)))
                of_all = f"{after / rank.seconds:.1%}" if after is not None and rank.seconds else ""
                rows.append([who, *times, of_all, f"{windows:,}"])
        if any(rank.exchanges() for rank in run.ranks):
            continue
        longer = [share for rank in run.ranks if (share := rank.exchange()) is not None]
        notes.append(
            f"{prefix}exchange of gradients that backward did not hide: about {max(longer):.1%} of the time "
            "(what closing backwards take more than open ones)."
            if longer
            else f"{prefix}communication is inside forward and backward, and not measured apart, which torch does for "
            "DistributedDataParallel alone. A profile shows it."
        )
    if rows:
        notes.append(
            "Measured by torch from the first transfer of a window to the end of the last, with the wait for slower "
            "ranks. What ran beside backward is in backward's time; what came after it is, on a CPU and with one "
            "model, the communication above, and taken off closing backward."
        )
    head = ["exchange of gradients", "per window", "beside backward", "after it", "of the time", "windows measured"]
    return _table(head, rows) + _notes(notes)


def _notes(words: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in words)


def _memory(runs: Sequence[RunData], names: Sequence[str]) -> str:
    series = {name: [(x, y / 2**20) for x, y in run.memory()] for name, run in zip(names, runs, strict=True)}
    rows = []
    for name, run in zip(names, runs, strict=True):
        for rank in run.ranks:
            peaks = ", ".join(
                f"{kind.replace('_', ' ')} {size / 2**20:,.0f} MiB" for kind, size in rank.peak_memory().items()
            )
            if peaks:
                rows.append([name, str(rank.rank), peaks])
    if not rows:
        return ""
    chart = _figure("memory of rank 0, MiB", line_chart(series, unit="MiB"))
    return f'<div class="charts">{chart}</div>' + _table(["run", "rank", "most"], rows)


def _plan(runs: Sequence[RunData], names: Sequence[str]) -> str:
    if len(runs) == 1:
        extra = [[name, "", str(value), "log(config=...)"] for name, value in _own_config(runs[0]).items()]
        return _table(["", "asked", "runs", "from"], [*runs[0].plan, *extra])
    plans = [{row[0]: row[2] for row in run.plan} | {k: str(v) for k, v in _own_config(run).items()} for run in runs]
    found = list(dict.fromkeys(name for plan in plans for name in plan))
    return _table(["", *names], [[name, *(plan.get(name, "") for plan in plans)] for name in found])


def _own_config(run: RunData) -> dict[str, object]:
    """What the script logged as its configuration, less what the plan shows."""
    shown = {row[0] for row in run.plan}
    return {name: value for name, value in run.config.items() if name not in shown}


def _events(runs: Sequence[RunData], names: Sequence[str], *, only: str = "", without: str = "") -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        for event in run.events:
            kind = str(event["event"])
            if (only and kind != only) or kind == without:
                continue
            if kind == "checkpoint" and event.get("rank"):
                continue  # all ranks write one together
            at = datetime.datetime.fromtimestamp(event.get("time", 0)).strftime("%Y-%m-%d %H:%M:%S")
            more = str(event.get("text", ""))
            more += f" held the loop for {event['seconds']:.2f} s" if "seconds" in event else ""
            more += f"{event['dropped']} later lines were taken back" if event.get("dropped") else ""
            rows.append([name, f"{event.get('step', '')}", str(event.get("rank", "")), at, "" if only else kind, more])
    head = ["run", "step", "rank", "when", "" if only else "what", ""]
    left = len(rows) - MOST_EVENTS
    note = f'<p class="note">and {left:,} more</p>' if left > 0 else ""
    return _table(head, rows[:MOST_EVENTS]) + note
