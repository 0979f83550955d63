"""The examination: this machine first, then processes of the configured strategy, then one table and an exit code."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerator.config import Resolved
from accelerator.launch import launch, parse
from strategies.errors import LaunchError
from strategies.process_group import read_environment

from .machine import Facts, address_of, facts_here
from .measure import Timing
from .report import console, show_checks, show_timings
from .topology import gpu_topology
from .verdicts import Check, check_collectives, check_meeting_point, check_ranks

WORKER = "accelerator.doctor.worker"


def examine(
    flags: Sequence[str], resolved: Resolved, *, environ: Mapping[str, str], directory: Path, seconds: float
) -> int:
    """Examine this machine, and what `flags` of the launcher and the configuration would start on it.

    Inside a job (torchrun, `srun`), this process is one of those examined; otherwise they are started here. Prints
    tables, on the first process of a job. Returns 0 if training can start, 1 if a check failed.
    """
    placement = read_environment(environ)
    meeting = _meeting_point(resolved, environ, is_main=placement.rank == 0)
    found: dict[str, Any] = {}
    problem = ""
    if meeting and meeting.verdict == "fail":
        problem = "not started: they would not meet"
    elif placement.size > 1:
        from .worker import examine_here

        found = examine_here(seconds)
    else:
        found, problem = _started(flags, environ, directory, seconds)
    if placement.rank:
        return 0
    checks = list(check_ranks([Facts(**facts) for facts in found["facts"]] if found else [facts_here()]))
    checks += [meeting] if meeting else []
    timings = [Timing(**timing) for timing in found.get("timings", ())]
    checks += [*_processes(found, problem), *([check_collectives(timings)] if timings else [])]
    checks.append(Check("GPU topology", "ok", _topology_in_short(gpu_topology())))
    out = console()
    show_checks(checks, out)
    if "\n" in gpu_topology():
        out.print(gpu_topology(), markup=False)
    if timings:
        show_timings(timings, found["link"], found["link_bytes_per_second"], out)
    failed = [check.name for check in checks if check.verdict == "fail"]
    out.print(f"training cannot start: {', '.join(failed)}" if failed else "training can start")
    return 1 if failed else 0


def _topology_in_short(table: str) -> str:
    return "the driver's table is below" if "\n" in table else table


def _meeting_point(resolved: Resolved, environ: Mapping[str, str], *, is_main: bool) -> Check | None:
    """Where the processes of several nodes, or of another launcher, are told to meet."""
    if "MASTER_ADDR" in environ:
        port = environ.get("MASTER_PORT", "0")
        agent_listens = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        listens = is_main and not agent_listens and port.isdecimal()
        return check_meeting_point(environ["MASTER_ADDR"], int(port) if listens else 0, hosts_here=listens)
    settings = resolved.settings.launch
    if not settings.rdzv_endpoint:
        return None
    host, _, port = settings.rdzv_endpoint.rpartition(":")
    host, port = (host, port) if host else (port, "0")
    is_host = address_of(host).startswith("127.") or settings.node_rank == 0
    return check_meeting_point(host, int(port) if port.isdecimal() else 0, hosts_here=is_host)


def _started(
    flags: Sequence[str], environ: Mapping[str, str], directory: Path, seconds: float
) -> tuple[dict[str, Any], str]:
    """What the processes found, and why there is nothing if there is not."""
    with tempfile.TemporaryDirectory(prefix="accelerator-doctor-") as folder:
        result = Path(folder) / "result.json"
        try:
            request = parse([*flags, "-m", WORKER, str(result), str(seconds)])
            code = launch(request, environ=environ, directory=directory)
        except LaunchError as error:
            return {}, str(error)
        if code == 0 and result.exists():
            return json.loads(result.read_text(encoding="utf-8")), ""
        return {}, f"ended with exit code {code}; what they said is above"


def _processes(found: Mapping[str, Any], problem: str) -> list[Check]:
    if not found:
        return [Check("processes", "fail", problem, "correct what they said, then run this again")]
    size, step = len(found["facts"]), found["step_seconds"]
    started = f"{size} joined under {found['strategy']}"
    if math.isnan(step):
        fix = 'try mixed_precision = "no"; if it stays, the device computes wrong numbers'
        return [Check("processes", "ok", started), Check("training step", "fail", "the loss is not finite", fix)]
    return [Check("processes", "ok", started), Check("training step", "ok", f"{step * 1e3:.0f} ms with a small model")]
