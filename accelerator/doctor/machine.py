"""What one process sees of its machine: versions, device, cores, limits, names."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from accelerator.launch.plan import cores_here
from strategies import xla_runtime

PACKAGES = ("torch", "torch-accelerator", "torch_xla", "numpy", "pydantic", "safetensors", "xxhash", "rich")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Facts:
    """One process. Sizes in bytes, `clock` in seconds since 1970; `address` is "" where the name has none.

    `open_files` is the soft limit, -1 without one; `shared_memory` is what `/dev/shm` holds, -1 where there is none.
    """

    rank: int
    host: str
    address: str
    versions: Mapping[str, str]
    device: str
    device_name: str
    cores: int
    threads: int
    open_files: int
    shared_memory: int
    clock: float = 0.0


def facts_here(rank: int = 0, device: torch.device | None = None) -> Facts:
    """The facts of this process, which computes on `device`."""
    device = device or torch.device("cpu")
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        address=address_of(socket.gethostname()),
        versions=versions_here(),
        device=str(device),
        device_name=device_name(device),
        cores=cores_here(),
        threads=torch.get_num_threads(),
        open_files=open_files_here(),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else -1,
    )


def versions_here() -> dict[str, str]:
    """Python, the packages that a run depends on, and what torch was built with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build: +cpu, +cu130
    for name, version in (("cuda", torch.version.cuda), ("hip", torch.version.hip)):
        if version is not None:
            found[name] = version
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


def device_name(device: torch.device) -> str:
    """The model of a device, as far as torch knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xla":
        return f"{xla_runtime.hardware()} of torch_xla"
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def open_files_here() -> int:
    """The soft limit on open files of this process."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return -1
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return -1 if soft == resource.RLIM_INFINITY else soft


def address_of(host: str) -> str:
    """The address that `host` resolves to here; empty if it does not."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def port_is_free(port: int) -> bool:
    """Whether this machine could listen on `port`."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how a run meets its hardware, in order of their names."""
    prefixes = (
        "ACCELERATOR_",
        "CUDA_",
        "GLOO_",
        "NCCL_",
        "OMP_",
        "PJRT_",
        "SLURM_",
        "TORCH",
        "XLA_",
        "CPU_NUM_DEVICES",
    )
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    return {name: environ[name] for name in sorted(environ) if name.startswith(prefixes) or name in names}
