"""Which strategy runs, and whether the processes that were asked for are the ones that are there."""

from __future__ import annotations

from collections.abc import Mapping

from strategies import LaunchError, World
from strategies.process_group import read_environment

from .config import Resolved


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
        f"launch.nproc_per_node is {launch.nproc_per_node} ({origin}): {asked} processes asked for, {world.size} "
        "found. Start the script with `accelerator launch`, or take the setting out."
    )
