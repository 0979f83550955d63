"""Carrying out a plan with torch's elastic agent, and turning its end into an exit code and a few plain lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerator.config import FLAGS_VARIABLE, resolve_settings

from .flags import Request
from .plan import Plan, cores_here, make_plan
from .preemption import handing_on, requeue_code
from .report import explain_failures
from .worker import LAUNCHER

WATCHED = "torch.distributed.elastic.multiprocessing.api"
NOISY = (
    "torch.distributed.elastic.multiprocessing.subprocess_handler",
    "torch.distributed.elastic.agent.server.api",
)


def launch(request: Request, *, environ: Mapping[str, str], directory: Path) -> int:
    """Start the processes that `request` and the configuration ask for, wait for them, and return an exit code.

    The code is that of the process that failed first; 128 + N if signal N ended it, or ended the launcher,
    which hands SIGTERM, SIGINT, SIGHUP, SIGQUIT and SIGUSR1 on to the processes. It is 75 if they saved because of
    one and ask to be started again, and 1 if the nodes did not meet.
    Raises `ConfigurationError` or `LaunchError` before any process is started. To be called on the main
    thread of the launching process.
    """
    inherited = {name: value for name, value in environ.items() if name != FLAGS_VARIABLE}
    resolved = resolve_settings(
        {}, environ={**inherited, FLAGS_VARIABLE: json.dumps(dict(request.flags))}, directory=directory
    )
    plan = make_plan(
        request,
        resolved,
        environ=inherited,
        directory=directory,
        cores=cores_here(),
        count_devices=_count_devices,
    )
    return run(plan)


def _count_devices() -> int:
    import torch

    return torch.accelerator.device_count()


def run(plan: Plan) -> int:
    """Start what is planned and wait for its end; see `launch` for the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from .attempts import Attempts, FirstFailure

    failures = FirstFailure(quiet="LOGLEVEL" not in os.environ)
    with (
        tempfile.TemporaryDirectory(prefix="accelerator-launch-") as folder,
        _agent_environment(plan),
        _quiet(failures),
    ):
        config = LaunchConfig(
            min_nodes=plan.min_nodes,
            max_nodes=plan.max_nodes,
            nproc_per_node=plan.nproc_per_node,
            run_id=plan.rdzv_id,
            rdzv_endpoint=plan.rdzv_endpoint,
            rdzv_backend=plan.rdzv_backend,
            rdzv_configs=dict(plan.rdzv_conf),
            max_restarts=plan.max_restarts,
            local_addr=plan.local_addr,
            logs_specs=Attempts(folder, plan.max_restarts, failures),
        )
        try:
            with handing_on(Path(folder)):
                elastic_launch(config, sys.executable)("-u", *plan.command)
        except ChildFailedError as error:
            return explain_failures(error.failures, Path(folder))
        except SignalException as error:
            return requeue_code(Path(folder)) or 128 + error.sigval.value
        except (RendezvousError, ConnectionError, TimeoutError) as error:
            print(
                f"accelerator launch: the nodes did not meet at {plan.rdzv_endpoint!r} ({plan.rdzv_backend}): {error} "
                f"Expected {plan.min_nodes} of them, with the same --rdzv-endpoint and --rdzv-id.",
                file=sys.stderr,
            )
            return 1
        return requeue_code(Path(folder)) or 0


@contextlib.contextmanager
def _agent_environment(plan: Plan) -> Iterator[None]:
    """The agent takes these from its own environment only, and so do the processes it starts."""
    before = dict(os.environ)
    os.environ.update({**plan.environment, LAUNCHER: str(os.getpid())})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet(failures: logging.Filter) -> Iterator[None]:
    """Keep the agent's own account of failures out of the way of ours; `LOGLEVEL` brings it back."""
    noisy = [] if "LOGLEVEL" in os.environ else [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.CRITICAL)
    watched = logging.getLogger(WATCHED)
    watched.addFilter(failures)
    try:
        yield
    finally:
        watched.removeFilter(failures)
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
