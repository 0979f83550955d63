"""What will be started, decided before anything is: a pure function of the settings and the machine."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerator.config import FLAGS_VARIABLE, Resolved
from strategies.errors import LaunchError
from strategies.registry import resolve

from .flags import Request

WORKER = str(Path(__file__).with_name("worker.py"))


@dataclass(frozen=True)
class Plan:
    """Everything torch's elastic agent has to be told. `environment` is laid over the launcher's own."""

    nproc_per_node: int
    min_nodes: int
    max_nodes: int
    max_restarts: int
    rdzv_backend: str
    rdzv_endpoint: str
    rdzv_id: str
    rdzv_conf: Mapping[str, str | int]
    local_addr: str | None
    command: tuple[str, ...]
    environment: Mapping[str, str]


def make_plan(
    request: Request,
    resolved: Resolved,
    *,
    environ: Mapping[str, str],
    directory: Path,
    cores: int,
    count_devices: Callable[[], int],
) -> Plan:
    """Raises `LaunchError` if the job cannot be started as asked. `count_devices` is called only if it decides."""
    settings = resolved.settings.launch
    low, _, high = settings.nnodes.partition(":")
    min_nodes, max_nodes = int(low), int(high or low)
    if min_nodes > max_nodes:
        raise LaunchError(
            f"nnodes is {settings.nnodes!r} ({resolved.origins['launch.nnodes']}); expected MIN:MAX with MIN <= MAX."
        )
    check_target(request, directory)
    strategy = resolved.settings.strategy
    if max_nodes > 1 and _trains_alone(strategy):
        raise LaunchError(
            f"nnodes is {settings.nnodes!r} ({resolved.origins['launch.nnodes']}) and strategy is {strategy!r} "
            f"({resolved.origins['strategy']}), which trains in one process on one machine: several machines are not "
            "built for it. Leave nnodes at 1, or use another strategy."
        )
    nproc = settings.nproc_per_node or _one_per_device(strategy, count_devices())
    conf: dict[str, str | int] = {
        key: value for key, _, value in (pair.partition("=") for pair in settings.rdzv_conf.split(",") if pair)
    }
    endpoint, job = _meeting_point(resolved, max_nodes, conf)
    return Plan(
        nproc_per_node=nproc,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        max_restarts=settings.max_restarts,
        rdzv_backend=settings.rdzv_backend,
        rdzv_endpoint=endpoint,
        rdzv_id=job,
        rdzv_conf=conf,
        local_addr=settings.local_addr,
        command=(WORKER, "module" if request.is_module else "script", request.target, *request.arguments),
        environment={
            **_store_variables(may_restart=settings.max_restarts > 0 or min_nodes < max_nodes),
            **_thread_variables(settings.num_cpu_threads, nproc, environ, cores),
            FLAGS_VARIABLE: json.dumps(_flags(request, directory)),
        },
    )


def _one_per_device(strategy: str, devices: int) -> int:
    return 1 if devices > 1 and _trains_alone(strategy) else max(1, devices)


def _trains_alone(strategy: str) -> bool:
    """Whether it trains in one process. A class of the script's own is not imported to ask it."""
    return strategy != "auto" and ":" not in strategy and resolve(strategy).single_process


def _meeting_point(resolved: Resolved, max_nodes: int, conf: dict[str, str | int]) -> tuple[str, str]:
    """Endpoint and id of the rendezvous. Adds to `conf` what the rank of this node implies."""
    settings, origins = resolved.settings.launch, resolved.origins
    if settings.rdzv_backend == "static":
        if settings.max_restarts:
            raise LaunchError(
                f"max_restarts is {settings.max_restarts} ({origins['launch.max_restarts']}) and rdzv_backend is "
                f"'static' ({origins['launch.rdzv_backend']}); expected 'c10d' with restarts: a static rendezvous "
                "hands restarted processes the addresses of the dead ones. Leave rdzv_backend out."
            )
        if settings.node_rank is None and max_nodes > 1:
            raise LaunchError(
                f"node_rank is not set, and rdzv_backend is 'static' ({origins['launch.rdzv_backend']}); expected "
                "--node-rank 0 on one node, 1 on the next, and so on."
            )
        conf["rank"] = settings.node_rank or 0  # torch compares it with the number 0
    elif settings.node_rank is not None and max_nodes > 1:
        conf.setdefault("is_host", "1" if settings.node_rank == 0 else "0")
    if settings.rdzv_endpoint:
        return settings.rdzv_endpoint, settings.rdzv_id or "accelerator"
    if max_nodes > 1 or settings.rdzv_backend != "c10d":
        raise LaunchError(
            f"rdzv_endpoint is not set, nnodes is {settings.nnodes!r} ({origins['launch.nnodes']}) and rdzv_backend "
            f"is {settings.rdzv_backend!r}; expected HOST:PORT of a node that all others reach. "
            "Give --rdzv-endpoint on every node."
        )
    # Port 0 lets the system choose a free one when the store binds it, so that no two jobs can race for it.
    return "localhost:0", settings.rdzv_id or uuid.uuid4().hex


def _store_variables(*, may_restart: bool) -> dict[str, str]:
    """How the processes meet: in the agent's store, or in one of their own for each attempt.

    After a restart, the agent's store still holds the addresses of the dead processes (pytorch#135712), so a job
    that may restart must not use it. A job that cannot is better off with it: a store of its own would listen on
    a port that was free when the agent looked, seconds before.
    """
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if may_restart else {}


def _thread_variables(asked: int | None, nproc: int, environ: Mapping[str, str], cores: int) -> dict[str, str]:
    if asked is None and "OMP_NUM_THREADS" in environ:
        return {}
    return {"OMP_NUM_THREADS": str(asked or max(1, cores // nproc))}


def _flags(request: Request, directory: Path) -> dict[str, str]:
    """The flags for the processes, which may be in another directory by the time they read them."""
    paths = {"config", "project_dir"} & request.flags.keys()
    return {**request.flags, **{name: str(directory / request.flags[name]) for name in paths}}


def check_target(request: Request, directory: Path) -> None:
    """Raises `LaunchError` if there is no such script or module; no module is imported to find out."""
    if not request.is_module:
        path = directory / request.target
        if path.is_dir() and not (path / "__main__.py").is_file():
            raise LaunchError(
                f"script is {request.target!r}, a folder without a __main__.py; expected the path of a Python script."
            )
        if not path.exists():
            near = " A module is started with -m." if "/" not in request.target else ""
            raise LaunchError(
                f"script is {request.target!r}, and {directory} has no such file; expected the path of a Python "
                f"script.{near if not request.target.endswith('.py') else ''}"
            )
        return
    within: Sequence[str] | None = [str(directory), *sys.path]
    for part in request.target.split("."):
        found = importlib.machinery.PathFinder.find_spec(part, within) if within is not None else None
        if found is None and part == request.target.partition(".")[0]:
            found = _found_by_any(part)
        if found is None:
            raise LaunchError(
                f"module is {request.target!r}, and {part!r} is not found; expected the name of a module that is "
                f"installed or lies under {directory}."
            )
        within = found.submodule_search_locations


def _found_by_any(name: str) -> importlib.machinery.ModuleSpec | None:
    """What the finders of packages that were installed to be edited know, too."""
    try:
        return importlib.util.find_spec(name)
    except (ValueError, ImportError):  # a name without a module of its own, such as __main__
        return None


def cores_here() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
