"""The SLURM examples on a real SLURM of two nodes, both on this machine: placement, requeue, several nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import resuming_loop
from rank_pool import TESTS, without_launch_variables
from resuming_loop import wait_until

EXAMPLES = TESTS.parent / "examples" / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs SLURM's programs, of which {', '.join(MISSING)} are not here"),
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.getuid() != 0, reason="SLURM's daemons start jobs as other users, which only root may"),
]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
KillWait=2
MessageTimeout=60
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=test Nodes=ALL Default=YES State=UP
"""


@dataclass
class Cluster:
    """A running SLURM. Commands run in a job's folder, with this interpreter as `python`."""

    environ: Mapping[str, str]

    def __call__(self, folder: Path, *command: str) -> str:
        ran = subprocess.run(command, cwd=folder, env=self.environ, capture_output=True, text=True, timeout=110)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def submit(self, folder: Path, script: str, *words: str) -> str:
        """Submit an example; the number of its job."""
        (folder / "train.py").write_text(resuming_loop.SCRIPT)
        return self(folder, "sbatch", "--parsable", str(EXAMPLES / script), *words, "train.py").strip()

    def finish(self, folder: Path, job: str) -> str:
        """Wait for the end of a job; what it wrote."""
        wait_until(lambda: (folder / "weights").exists(), lambda: self.written(folder, job))
        wait_until(
            lambda: "COMPLETED" in self(folder, "scontrol", "show", "job", job), lambda: self.written(folder, job)
        )
        return self.written(folder, job)

    def shown(self, folder: Path, job: str) -> str:
        return self(folder, "scontrol", "show", "job", job)

    def is_back(self, folder: Path, job: str) -> bool:
        """Whether a requeued job was started again, which is asked for: SLURM waits two minutes by itself."""
        shown = self.shown(folder, job)
        if "Restarts=1" not in shown:
            return False
        if "JobState=RUNNING" in shown or "JobState=COMPLETED" in shown:
            return True
        command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # refused while the old processes end
        subprocess.run(command, env=self.environ, capture_output=True, timeout=30)
        return False

    def written(self, folder: Path, job: str) -> str:
        path = folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    with socket.create_server(("", 0)) as a, socket.create_server(("", 0)) as b, socket.create_server(("", 0)) as c:
        ports = [server.getsockname()[1] for server in (a, b, c)]
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    environ = without_launch_variables(dict(os.environ)) | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": f"{TESTS.parent}:{TESTS / 'support'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",  # the nodes have names that lead nowhere
    }
    munge = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    munge.append(f"--key-file={folder}/munge.key")
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n0"],
        ["slurmd", "-D", "-N", "n1"],
    ]
    with open(folder / "daemons.log", "wb") as log:
        running = []
        for words in daemons:
            running.append(subprocess.Popen(words, env=environ, stdout=log, stderr=log))
            if words[0] == "munged":
                wait_until((folder / "munge.socket").exists, (folder / "daemons.log").read_text)
        started = Cluster(environ)
        try:
            wait_until(lambda: _idle_nodes(environ) == 2, (folder / "daemons.log").read_text)
            yield started
        finally:
            subprocess.run(["scancel", "--state=RUNNING"], env=environ, timeout=30)
            subprocess.run(["scancel", "--state=PENDING"], env=environ, timeout=30)
            for daemon in reversed(running):
                daemon.terminate()
                daemon.wait(30)


def _idle_nodes(environ: Mapping[str, str]) -> int:
    listed = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %t"], env=environ, capture_output=True, text=True)
    return sum(line.endswith(" idle") for line in listed.stdout.splitlines())


PLACE = """
import os, torch
from strategies import DDP, collectives
from strategies.process_group import read_environment

strategy = DDP(device="cpu")
world = strategy.setup()
total = collectives.reduce(torch.tensor(world.rank + 1.0), world)
print(world.rank, world.local_rank, world.local_size, world.size, total.item(), read_environment(os.environ).launcher)
strategy.teardown(world)
"""


def test_ranks_are_where_slurm_put_them(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "place.py").write_text(PLACE)
    printed = cluster(tmp_path, "srun", "-N2", "-n3", "--distribution=block", "python", "place.py")
    rows = sorted(line for line in printed.splitlines() if line.endswith(" slurm"))
    assert rows == ["0 0 2 3 6.0 slurm", "1 1 2 3 6.0 slurm", "2 0 1 3 6.0 slurm"]


def test_a_job_goes_on_after_it_went_back_to_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, "single_node.sh")
    wait_until((tmp_path / "halfway").exists, lambda: cluster.written(tmp_path, job))
    cluster(tmp_path, "scancel", "--batch", "--signal=USR1", job)  # as two minutes before the time is up
    wait_until(lambda: cluster.is_back(tmp_path, job), lambda: cluster.shown(tmp_path, job))
    written = cluster.finish(tmp_path, job)
    assert f"job {job} goes back to the queue" in written
    assert written.count("of 2 begins after step 0") == 2
    assert written.count("of 2 begins after step 4") == 2
    for ours, truth in zip(torch.load(tmp_path / "weights"), resuming_loop.weights_of_one_process(), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)


def test_two_nodes_with_a_launcher_on_each(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "halfway").touch()  # nobody stops it
    job = cluster.submit(tmp_path, "multi_node.sh")
    written = cluster.finish(tmp_path, job)
    assert sorted(line for line in written.splitlines() if "begins" in line) == [
        "rank 0 of 2 begins after step 0",
        "rank 1 of 2 begins after step 0",
    ]
    for ours, truth in zip(torch.load(tmp_path / "weights"), resuming_loop.weights_of_one_process(), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)
