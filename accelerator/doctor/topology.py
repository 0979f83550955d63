"""How devices are linked: from the driver's own tables, and what a link carries, measured or as the driver says."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import torch

LARGE_BYTES = 64 * 2**20


def gpu_topology() -> str:
    """The table of `nvidia-smi topo -m` (NV# is NVLink, PIX to SYS are PCIe and the sockets), or why there is none."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not on the PATH, so the driver's table is not shown"
    ran = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=30)
    if ran.returncode:
        return f"nvidia-smi topo -m failed: {(ran.stderr or ran.stdout).strip()[:200]}"
    return ran.stdout.split("\nLegend:")[0].rstrip()


def link_here(device: torch.device, num_hosts: int) -> tuple[str, float]:
    """What processes of this job talk over, in words, and how many bytes a second it carries; 0.0 if unknown."""
    if num_hosts > 1:
        speed = network_speed()
        return ("network card, as it says" if speed else "network of unknown speed"), speed
    if device.type == "cpu":
        return "memory, one copy", _copies(device, device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        return "copy from GPU to GPU", _copies(torch.device("cuda", 0), torch.device("cuda", 1))
    return "no second device here", 0.0


def network_speed() -> float:
    """Bytes a second of the fastest network card that is up, as the driver says; 0.0 if none says it."""
    found = 0.0
    for folder in Path("/sys/class/net").glob("*"):
        try:
            if (folder / "operstate").read_text().strip() == "up":
                found = max(found, float((folder / "speed").read_text()) * 1e6 / 8)
        except (OSError, ValueError):  # virtual cards say nothing
            continue
    return found


def _copies(source: torch.device, target: torch.device) -> float:
    sent = torch.ones(LARGE_BYTES // 4, device=source)
    received = torch.empty_like(sent, device=target)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        received.copy_(sent)
        received[:1].cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return LARGE_BYTES / min(seconds)
