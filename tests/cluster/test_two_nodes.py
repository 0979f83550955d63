"""Two nodes, network namespaces with addresses of their own, under the elastic agent: one is killed and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import resuming_loop
from rank_pool import TESTS, without_launch_variables
from resuming_loop import wait_until


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces, joined by a pair of network cards; their names, by which `ip netns exec` starts programs."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("needs root and iproute2's `ip`, to make network namespaces")
    names = [f"node{number}-{os.getpid()}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "delete", names[0]], capture_output=True)
        pytest.skip(f"this kernel makes no network namespaces: {error.stderr.strip()}")
    ip("-n", names[0], "link", "add", "card0", "type", "veth", "peer", "name", "card1", "netns", names[1])
    for number, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"card{number}")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", f"card{number}", "up")
    yield names
    for name in names:
        end(name)
        ip("netns", "delete", name)


def end(name: str) -> None:
    """Kill everything that runs on a node, as a power cut does."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


def start(nodes: list[str], number: int, folder: Path) -> subprocess.Popen[bytes]:
    environ = without_launch_variables(dict(os.environ)) | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS / 'support'}",
        "GLOO_SOCKET_IFNAME": f"card{number}",
        "OMP_NUM_THREADS": "1",
    }
    flags = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--max-restarts", "3"]
    flags += ["--rdzv-endpoint", "10.77.0.1:29400", "--local-addr", f"10.77.0.{number + 1}"]
    flags += ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=2"]
    command = ["ip", "netns", "exec", nodes[number], sys.executable, "-m", "accelerator", "launch", *flags, "train.py"]
    with open(folder / f"node{number}.log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def logs_of(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("node*.log"))]


@pytest.mark.timeout(240)
def test_a_node_is_killed_and_comes_back(nodes: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(resuming_loop.SCRIPT)
    launchers = [start(nodes, number, tmp_path) for number in range(2)]
    wait_until((tmp_path / "halfway").exists, lambda: logs_of(tmp_path))
    end(nodes[1])
    launchers[1].wait(10)
    launchers[1] = start(nodes, 1, tmp_path)
    wait_until(lambda: all(launcher.poll() is not None for launcher in launchers), lambda: logs_of(tmp_path))
    logs = logs_of(tmp_path)
    assert [launcher.returncode for launcher in launchers] == [0, 0], logs
    for log in logs:
        assert log.count("of 2 begins after step 0") == 1
        assert log.count("of 2 begins after step 4") == 1
    for ours, truth in zip(torch.load(tmp_path / "weights"), resuming_loop.weights_of_one_process(), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)
