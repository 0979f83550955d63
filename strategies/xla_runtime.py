"""The runtime of torch_xla in this process: started before any backward, in one mode, and seeded."""

from __future__ import annotations

import functools
import logging
import os
import sys
from importlib import metadata
from pathlib import Path

import torch

from .errors import LaunchError
from .process_group import read_environment

_log = logging.getLogger("accelerator")


def start(strategy: str, *, wants_mesh: bool) -> tuple[torch.device, int]:
    """Start the runtime, or find the one that runs; the device that tensors are put on, and how many there are.

    With `wants_mesh` and several devices, one program runs on all of them (SPMD), which a process does from its
    start to its end or never. Raises `LaunchError` if the runtime is not there, does not fit torch or the processes
    that were started, finds no hardware that was asked for, or is in the other mode.
    """
    _refuse_several_processes(strategy)
    _import(strategy)
    import torch_xla
    import torch_xla.runtime as xr

    is_first = not torch_xla._XLAC._xla_runtime_is_initialized()
    try:
        num_devices = xr.global_runtime_device_count()
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"torch_xla finds no device of the kind that PJRT_DEVICE names, {os.environ.get('PJRT_DEVICE')!r}; "
            "expected TPU, on a host that has one and with libtpu (pip install 'torch_xla[tpu]'), or CPU. "
            f"It said: {str(error).splitlines()[0][:200]}"
        ) from error
    refuse_several_hosts(strategy, xr.process_count())
    spmd = wants_mesh and num_devices > 1
    if xr.is_spmd() and not spmd:
        raise LaunchError(
            f"{strategy} asks for one device, but this process already runs every program on all {num_devices}. "
            "A process is in one mode from start to end. Start another process, or choose shard='data'."
        )
    if spmd and not xr.is_spmd():
        xr.use_spmd()
    device = torch_xla.device()
    _refuse_late_start(device)
    _forbid_where_forked()
    if is_first:
        seed(torch.initial_seed())  # torch_xla's own is the same in every process
    return device, num_devices


@functools.cache  # once in a process
def _forbid_where_forked() -> None:
    """Have forked processes raise where they run anything: they would wait for ever for threads of this one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(allow_reads, False))


def seed(value: int) -> None:
    """Seed the generator of the device, which `torch.manual_seed` does not reach."""
    import torch_xla

    torch_xla.manual_seed(value % 2**63)


def run_recorded() -> None:
    """Run what was recorded. Random numbers go on from the last one drawn, wherever runs lie between them.

    torch_xla begins other ones after each run, so that an evaluation or a checkpoint would change what training draws.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm

    drawn_last = xm.get_rng_state()
    torch_xla.sync()
    xm.set_rng_state(drawn_last)


def allow_reads(allowed: bool) -> None:
    """Whether values may be read from devices. Forbidden, a read raises and its stack is printed."""
    import torch_xla

    torch_xla._XLAC._set_allow_execution(allowed)


def is_forbidden(error: BaseException) -> bool:
    """Whether `error` is what a process gets that reads, or runs anything, while that is not allowed."""
    return "Unexpected execution happens" in str(error)


def hardware() -> str:
    """What the runtime of this process drives, such as "4 x TPU"."""
    import torch_xla.runtime as xr

    return f"{xr.global_runtime_device_count()} x {xr.device_type()}"


def refuse_several_hosts(strategy: str, num_processes: int) -> None:
    """Raise `LaunchError` where torch_xla counts more processes than this one."""
    if num_processes > 1:
        raise LaunchError(
            f"{strategy} found {num_processes} processes of torch_xla, as on several hosts; expected one. "
            "Training over several hosts is not built yet: use the devices of one host."
        )


def _import(strategy: str) -> None:
    chosen, was_there = os.environ.get("PJRT_DEVICE"), "torch_xla" in sys.modules
    try:
        import torch_xla  # noqa: F401  # an import that fails must fail here
    except ImportError as error:
        raise LaunchError(
            f"{strategy} needs torch_xla, and {_installed()}; expected torch 2.9.0 with torch_xla 2.9.0, built for "
            "each other. pip install 'torch-accelerator[xla]' brings both. "
            f"Python said: {str(error).splitlines()[0][:200]}"
        ) from error
    if not chosen and os.environ.get("PJRT_DEVICE", "CPU") == "CPU":
        os.environ.pop("PJRT_DEVICE", None)  # torch_xla has set it, when it was imported
        raise LaunchError(
            f"{strategy} found no TPU on this host, and torch_xla would take the CPU instead. Set PJRT_DEVICE=CPU to "
            "mean that (CPU_NUM_DEVICES is how many), or run on a host with a TPU and libtpu."
        )
    if was_there and chosen == "CPU" and _was_set_since_the_start("PJRT_DEVICE"):
        _log.warning(
            "%s runs on the CPU: PJRT_DEVICE=CPU was set in this process. If the script did so, all is well. Else "
            "torch_xla did, which was imported before the Accelerator was constructed and found no TPU. Set "
            "PJRT_DEVICE where the process is started.",
            strategy,
        )


def _was_set_since_the_start(variable: str) -> bool:
    """Whether this process began without `variable`; False where the system does not tell."""
    try:
        began_with = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(f"{variable}=".encode()) for entry in began_with)


def _installed() -> str:
    try:
        return f"torch_xla {metadata.version('torch_xla')} is installed beside torch {torch.__version__}"
    except metadata.PackageNotFoundError:
        return f"it is not installed (torch is {torch.__version__})"


def _refuse_several_processes(strategy: str) -> None:
    placement = read_environment(os.environ)
    if placement.size > 1:
        # Each would be told that it is alone, and train a model of its own.
        raise LaunchError(
            f"{strategy} drives all devices of a host from one process, but {placement.launcher} started "
            f"{placement.size}. Start one: plain `python`, or `accelerator launch --nproc-per-node 1`."
        )


def _refuse_late_start(device: torch.device) -> None:
    """Torch counts the devices of its backward threads once, in the first backward of the process."""
    try:
        torch.ones((), device=device, requires_grad=True).mul(1).backward()
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        raise LaunchError(
            "a backward ran in this process before the runtime of torch_xla was started, after which none can run on "
            "its devices. Construct the Accelerator before the first backward."
        ) from error
