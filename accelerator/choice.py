"""Which strategy runs, what all ranks must have chosen alike, and whether the processes asked for are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from strategies import LaunchError, Strategy, World
from strategies.prepared import DataOptions, Fact
from strategies.process_group import read_environment

from .config import Resolved, Settings

# What one step over all ranks is made of: each computes its own part of it by these.
_ALIKE = (
    "mixed_precision",
    "gradient_accumulation_steps",
    "global_batch_size",
    "split_batches",
    "dispatch_batches",
    "seed_samples",
    "pad_batches",
    "detect_nonfinite",
)


def chosen_name(resolved: Resolved, environ: Mapping[str, str]) -> str:
    """The name of the strategy that runs: what was asked, or what `auto` comes to here.

    `auto` is `ddp` where a launcher started several processes, and `single` otherwise.
    """
    if resolved.settings.strategy != "auto":
        return resolved.settings.strategy
    return "ddp" if read_environment(environ).size > 1 else "single"


def check_world(resolved: Resolved, world: World) -> None:
    """Raise `LaunchError` if another number of processes was asked for than is there."""
    launch, origin = resolved.settings.launch, resolved.origins["launch.nproc_per_node"]
    if launch.nproc_per_node is None:
        return
    least, _, most = launch.nnodes.partition(":")
    expected = range(int(least), int(most or least) + 1)
    if world.size in [nodes * launch.nproc_per_node for nodes in expected]:
        return
    asked = " or ".join(str(nodes * launch.nproc_per_node) for nodes in expected)
    raise LaunchError(
        f"launch.nproc_per_node is {launch.nproc_per_node} ({origin}); processes asked for: {asked}, found: "
        f"{world.size}. Start the script with `accelerator launch`, or take the setting out."
    )


def options_of(settings: Settings) -> DataOptions:
    """What the settings ask of all loaders."""
    return DataOptions(
        split_batches=settings.split_batches,
        dispatch_batches=settings.dispatch_batches,
        seed_samples=settings.seed_samples,
        pad_batches=settings.pad_batches,
    )


def chosen_alike(resolved: Resolved, name: str, strategy: Strategy) -> list[Fact]:
    """The settings that decide the step, which all ranks must share; `name` is that of the strategy which runs."""
    origins = resolved.origins
    unnamed = "code" if isinstance(resolved.strategy_in_code, Strategy) else "default"
    kind = type(strategy)
    facts = [Fact("strategy", f"{kind.__module__}.{kind.__qualname__}", origins["strategy"])]
    facts += [Fact.of(setting, getattr(resolved.settings, setting), origins[setting]) for setting in _ALIKE]
    for field in fields(strategy):
        option = f"{name}.{field.name}"
        facts.append(Fact.of(option, getattr(strategy, field.name), origins.get(option, unnamed)))
    return facts
