"""What people read: the table of verdicts, the table of collectives, and the text for a bug report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from accelerator.launch.plan import cores_here

from .machine import facts_here, relevant_variables
from .measure import Timing
from .topology import gpu_topology
from .verdicts import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def console() -> Console:
    """A terminal in its own width; a file in one that cuts no line of a usual table."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=140, highlight=False)


def show_checks(checks: Sequence[Check], to: Console) -> None:
    """A line per check, with what to do where something is to be done."""
    table = Table(title="accelerator doctor", title_justify="left")
    for column in ("check", "verdict", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(
            check.name, f"[{STYLES[check.verdict]}]{check.verdict}[/]", _plain(check.found), _plain(check.fix)
        )
    to.print(table)


def show_timings(timings: Sequence[Timing], link: str, link_speed: float, to: Console) -> None:
    """Latency and bandwidth of every collective, beside what the link carries."""
    speed = f"{link_speed / 1e9:.2f} GB/s" if link_speed else "unknown"
    table = Table(title=f"collectives; link: {link}, {speed}", title_justify="left")
    for column in ("collective", "latency of 4 bytes", "each rank moves", "of the link"):
        table.add_column(column, justify="left" if column == "collective" else "right")
    for timing in timings:
        moved = timing.bytes_per_second
        share = f"{moved / link_speed:.0%}" if moved and link_speed else ""
        shown = f"{moved / 1e9:.2f} GB/s" if moved else ""
        table.add_row(timing.name, f"{timing.latency_seconds * 1e6:,.0f} us", shown, share)
    to.print(table)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")  # rich would read it as a style


def environment_report(environ: Mapping[str, str], configuration: str) -> str:
    """What a bug report needs: versions, machine, devices, variables and the configuration."""
    facts = facts_here()
    rows = [
        ("platform", f"{platform.platform()}, {cores_here()} cores"),
        ("open files", str(facts.open_files)),
        ("/dev/shm", f"{facts.shared_memory / 2**20:,.0f} MiB" if facts.shared_memory >= 0 else "none"),
        ("devices", devices_here()),
        *((name, version) for name, version in facts.versions.items()),
    ]
    width = max(len(name) for name, _ in rows)
    variables = "\n".join(f"  {name}={value}" for name, value in relevant_variables(environ).items()) or "  none"
    parts = [
        "\n".join(f"{name:<{width}}  {value}" for name, value in rows),
        f"variables\n{variables}",
        "configuration\n" + "\n".join(f"  {line}" for line in configuration.splitlines()),
        "GPU topology\n" + "\n".join(f"  {line}" for line in gpu_topology().splitlines()),
    ]
    return "\n\n".join(parts)


def devices_here() -> str:
    """The accelerators of this machine with their number, as torch sees them."""
    import torch

    if not torch.accelerator.is_available():
        return "none: torch sees only the CPU"
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else str(kind)
    return f"{count} x {name}"
