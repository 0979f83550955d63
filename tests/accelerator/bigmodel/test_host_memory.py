"""Memory that is free within the limits of control groups, as containers and schedulers set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from accelerator.bigmodel.host_memory import free_on_host

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: int | str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1000 kB to give away."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    return tmp_path


def test_without_groups(root: Path) -> None:
    assert free_on_host(root) == 1000 * 1024
    (root / "proc/self/cgroup").write_text("0::/\n")
    group(root / "sys/fs/cgroup", V2, "max", 5000, 0)
    assert free_on_host(root) == 1000 * 1024


def test_the_groups_of_a_job_and_those_above_it(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/slurm/job_1/step\n")
    group(root / "sys/fs/cgroup/slurm/job_1/step", V2, "max", 300, 0)
    group(root / "sys/fs/cgroup/slurm/job_1", V2, 9000, 5000, 3000)  # of which 3000 are files, read long ago
    assert free_on_host(root) == 9000 - 2000
    group(root / "sys/fs/cgroup/slurm", V2, 8000, 7500, 0)
    assert free_on_host(root) == 500
    group(root / "sys/fs/cgroup/slurm", V2, 8000, 8100, 0)
    assert free_on_host(root) == 0


def test_a_container_that_does_not_see_where_its_group_is(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/docker/abc\n")
    group(root / "sys/fs/cgroup", V2, 700, 200, 0)
    assert free_on_host(root) == 500


def test_groups_of_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:cpu,memory:/job\n3:pids:/job\n0::/\n")
    group(root / "sys/fs/cgroup/memory", V1, 2**63 - 4096, 10**6, 0)
    assert free_on_host(root) == 1000 * 1024
    group(root / "sys/fs/cgroup/memory/job", V1, 9000, 5000, 3000)
    assert free_on_host(root) == 7000
