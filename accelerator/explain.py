"""What was asked, what runs, and where every setting came from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from strategies import Strategy, World
from strategies.accumulation import Accumulation
from strategies.prepared.dataloader import DataLoaderLink
from strategies.prepared.stream import Stream
from strategies.sharding import Cut

from .batch_arithmetic import BatchArithmetic
from .config import Resolved, Settings


@dataclass(frozen=True)
class Row:
    """One line: a name, what was asked, what runs, and the origin of what was asked."""

    name: str
    asked: str
    got: str
    origin: str


@dataclass(frozen=True)
class Explanation:
    """The lines of `Accelerator.explain()`; `str` gives them as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [("", "asked", "runs", "from"), *((row.name, row.asked, row.got, row.origin) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in table
        )

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


def explain(resolved: Resolved, name: str, accumulation: Accumulation, arithmetic: BatchArithmetic) -> Explanation:
    """The plan of this run on this rank. `name` is that of the strategy which runs."""
    settings, origins, world = resolved.settings, resolved.origins, accumulation.world
    strategy = accumulation.strategy
    kind = type(strategy)
    rows = [
        Row("strategy", settings.strategy, f"{kind.__name__} ({kind.__module__})", origins["strategy"]),
        Row("device", "", str(world.device), ""),
        Row(
            "processes",
            str(settings.launch.nproc_per_node or ""),
            f"{world.size}, this is rank {world.rank}"
            + (f", over {_backend(world)}" if world.backend else ", no process group"),
            origins["launch.nproc_per_node"],
        ),
        Row(
            "mixed_precision",
            settings.mixed_precision,
            str(accumulation.precision.dtype or "the parameters' dtype").replace("torch.", ""),
            origins["mixed_precision"],
        ),
        *_arithmetic(resolved, arithmetic),
        Row("split_batches", str(settings.split_batches), str(settings.split_batches), origins["split_batches"]),
        Row(
            "dispatch_batches",
            str(settings.dispatch_batches),
            str(settings.dispatch_batches),
            origins["dispatch_batches"],
        ),
        Row("pad_batches", str(settings.pad_batches), str(settings.pad_batches), origins["pad_batches"]),
        Row("seed_samples", str(settings.seed_samples), str(settings.seed_samples), origins["seed_samples"]),
        Row("seed", str(settings.seed), _seed(settings.seed), origins["seed"]),
        Row("project_dir", str(settings.project_dir), str(settings.project_dir), origins["project_dir"]),
        Row("trackers", ", ".join(settings.trackers), _trackers(settings), origins["trackers"]),
        *_debugging(resolved),
        Row("timers", str(settings.timers), _timers(settings), origins["timers"]),
        *_options(resolved, strategy, name),
        *(
            Row(f"model {index} {name}", "", words, "")
            for index, link in enumerate(accumulation.models)
            for name, words in strategy.describe(link.wrapped, world).items()
        ),
        *(Row(f"loader {index}", "", _loader(link), "") for index, link in enumerate(accumulation.loaders)),
    ]
    return Explanation(tuple(rows))


def _debugging(resolved: Resolved) -> list[Row]:
    """The settings that look for bugs, where any is on."""
    names = [
        name
        for name in ("data_ledger", "detect_nonfinite", "hang_notice", "hang_timeout", "first_step_timeout")
        if getattr(resolved.settings, name)
    ]
    values = [(name, str(getattr(resolved.settings, name))) for name in names]
    return [Row(name, value, value, resolved.origins[name]) for name, value in values]


def _backend(world: World) -> str:
    """The backend for this device, of a list such as "cpu:gloo,cuda:nccl"."""
    by_device = dict(part.split(":") for part in str(world.backend).split(",") if ":" in part)
    return by_device.get(world.device.type, str(world.backend))


def _arithmetic(resolved: Resolved, arithmetic: BatchArithmetic) -> list[Row]:
    settings, origins = resolved.settings, resolved.origins
    if settings.global_batch_size is None:
        steps = str(settings.gradient_accumulation_steps)
        return [Row("gradient_accumulation_steps", steps, steps, origins["gradient_accumulation_steps"])]
    got = f"{arithmetic.steps} micro-batches a step" if arithmetic.has_loaders else "derived from the first loader"
    return [Row("global_batch_size", str(settings.global_batch_size), got, origins["global_batch_size"])]


def _trackers(settings: Settings) -> str:
    if settings.project_dir is None and settings.trackers == ("jsonl",):
        return "nothing: no project_dir"
    return ", ".join(settings.trackers) or "nothing"


def _timers(settings: Settings) -> str:
    if settings.project_dir is None or not settings.timers:
        return "off" if not settings.timers else "off: no project_dir"
    return "on, with operations counted" if settings.count_flops else "on"


def _seed(seed: int | None) -> str:
    return f"torch's own: {torch.initial_seed()}" if seed is None else str(seed)


def _options(resolved: Resolved, strategy: Strategy, name: str) -> list[Row]:
    rows = []
    for field in fields(strategy):
        value = getattr(strategy, field.name)
        in_code = isinstance(resolved.strategy_in_code, Strategy) and value != field.default
        origin = resolved.origins.get(f"{name}.{field.name}", "code" if in_code else "default")
        rows.append(Row(f"strategy.{field.name}", str(value), str(value), origin))
    return rows


def _loader(link: DataLoaderLink) -> str:
    dataset = type(link.original.dataset).__name__
    source = link.source
    if isinstance(source, Stream):
        return f"{dataset}: {source.describe()}"
    cut, order = source.cut, source.order
    words = {"shuffled": f"shuffled with seed {order.seed}", "sequential": "in order"}
    how = words.get(order.kind, f"as {order.kind} draws it, with seed {order.seed}")
    if not isinstance(cut, Cut):
        return f"{dataset}: {order.length} batches, {how}, {len(source)} global batches"
    if not cut.counts_samples:
        return f"{dataset}: {order.length} items, {how}, one per process at a time"
    whole = replace(cut, start=0)
    tail = whole.length % whole.global_batch
    left = f", the last {'dropped' if whole.drop_last else 'one'} of {tail}" if tail else ""
    return f"{dataset}: {whole.length} samples, {how}, {whole.num_batches} global batches of {whole.global_batch}{left}"
