"""The doctor: verdicts from facts, every collective on real ranks, and whole examinations with planted faults."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import accelerator.config
from accelerator.cli import main
from accelerator.doctor.machine import Facts, facts_here, relevant_variables
from accelerator.doctor.measure import Timing, _compare, measure, probes
from accelerator.doctor.topology import gpu_topology, link_here
from accelerator.doctor.verdicts import Check, check_collectives, check_meeting_point, check_ranks
from accelerator.doctor.worker import examine_here
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import DDP, World

ROOT = Path(accelerator.config.__file__).parents[2]
HEALTHY = Facts(
    rank=0,
    host="a",
    address="10.0.0.1",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    device="cuda:0",
    device_name="H200",
    cores=8,
    threads=4,
    open_files=65536,
    shared_memory=2**33,
    clock=100.0,
)
PEER = replace(HEALTHY, rank=1, device="cuda:1")
ELSEWHERE = replace(PEER, host="b", address="10.0.0.2", device="cuda:0")


def verdicts(*ranks: Facts) -> dict[str, Check]:
    """The checks that found something."""
    return {check.name: check for check in check_ranks(ranks) if check.verdict != "ok"}


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert verdicts(HEALTHY) == {}
    assert verdicts(HEALTHY, PEER) == {}
    assert verdicts(HEALTHY, ELSEWHERE) == {}


@pytest.mark.parametrize(
    ("rank", "name", "verdict", "words"),
    [
        (replace(PEER, versions={"torch": "2.9.0"}), "versions", "fail", "python differs: 3.11.7 on rank 0; missing"),
        (replace(PEER, device="cpu"), "devices", "fail", "cuda:0 on rank 0; cpu on rank 1"),
        (replace(PEER, device="cuda:0"), "devices", "fail", "several processes on cuda:0 on a"),
        (replace(ELSEWHERE, device_name="A100"), "devices", "warn", "H200 on rank 0; A100 on rank 1"),
        (replace(PEER, threads=5), "CPU threads", "warn", "4 + 5 threads on 8 cores of a"),
        (replace(PEER, open_files=1000), "open files", "warn", "at most 1000 on rank 1"),
        (replace(PEER, open_files=100), "open files", "fail", "at most 100 on rank 1"),
        (replace(PEER, shared_memory=64 * 2**20), "shared memory", "warn", "/dev/shm of 64 MiB"),
        (replace(PEER, shared_memory=-1), "shared memory", "warn", "no /dev/shm"),
        (replace(ELSEWHERE, address=""), "host name", "fail", "b does not resolve"),
        (
            replace(ELSEWHERE, address="127.0.1.1"),
            "host name",
            "warn",
            "b is 127.0.1.1, which other nodes cannot reach",
        ),
        (replace(ELSEWHERE, clock=97.5), "clocks", "warn", "2.5 s apart; rank 1 on b is behind"),
    ],
)
def test_verdicts(rank: Facts, name: str, verdict: str, words: str) -> None:
    found = verdicts(HEALTHY, rank)
    assert list(found) == [name]
    assert found[name].verdict == verdict
    assert words in found[name].found
    assert found[name].fix


def test_a_wrong_answer_of_a_collective_keeps_training_from_starting() -> None:
    wrong = _compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    check = check_collectives([Timing("reduce", 1e-6), Timing("gather", 1e-6, error=wrong)])
    assert check.verdict == "fail"
    assert check.found == "gather: wrong: [1.0, 2.0], expected [1.0, 3.0]"


def test_a_meeting_point() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert check_meeting_point("localhost", port, hosts_here=True).found == f"port {port} is taken here"
        assert check_meeting_point("localhost", port, hosts_here=False).verdict == "ok"
    assert check_meeting_point("no-such-host.invalid", 1, hosts_here=False).verdict == "fail"


def measure_on_a_rank() -> tuple[list[Timing], int]:
    strategy = DDP(device="cpu")
    world = strategy.setup()
    try:
        return measure(world, 4096), len(probes(world))
    finally:
        strategy.teardown(world)


@pytest.mark.parametrize("nproc", [1, 3])
def test_every_collective_is_right_and_timed(ranks: RankPool, nproc: int) -> None:
    for timings, number in ranks(measure_on_a_rank, nproc=nproc):
        assert [timing.error for timing in timings] == [""] * number
        assert all(timing.latency_seconds > 0 for timing in timings)
        moving = {timing.name for timing in timings if timing.bytes_per_second}
        assert moving == ({"reduce", "gather", "gather_uneven", "broadcast"} if nproc > 1 else set())


def test_every_public_collective_is_tried() -> None:
    from strategies import collectives

    public = {
        name
        for name, value in vars(collectives).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == collectives.__name__
    }
    assert {probe.name for probe in probes(World())} == public - {"digest_of"}  # which sends nothing


def examine_on_a_rank(strategy: str) -> dict[str, object]:
    os.environ["ACCELERATOR_STRATEGY"] = strategy
    return examine_here(100.0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_examination_by_the_ranks_of_a_job(ranks: RankPool, strategy: str) -> None:
    first, second = ranks(examine_on_a_rank, strategy)
    assert first["facts"] == second["facts"]
    assert str(first["strategy"]).lower() == strategy
    assert float(str(first["step_seconds"])) > 0
    assert float(str(first["link_bytes_per_second"])) > 0


def test_facts_of_this_machine() -> None:
    facts = facts_here()
    assert facts.versions["torch"] == torch.__version__
    assert facts.open_files in (-1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    assert gpu_topology()
    assert link_here(torch.device("cpu"), 2)[1] >= 0
    assert relevant_variables({"NCCL_DEBUG": "INFO", "HOME": "/root", "RANK": "1"}) == {
        "NCCL_DEBUG": "INFO",
        "RANK": "1",
    }


def test_env_prints_what_a_bug_report_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerator.toml").write_text("seed = 3\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"torch              {torch.__version__}" in shown
    assert "  NCCL_DEBUG=INFO\n" in shown
    assert "accelerator.toml line 1" in shown
    (tmp_path / "accelerator.toml").write_text("sede = 3\n")
    assert main(["env"]) == 0
    assert "ConfigurationError: accelerator.toml line 1 has an unknown setting 'sede'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py"], "'train.py' is no flag"),
        (["--seconds", "soon"], "seconds is 'soon'; expected an integer >= 1"),
        (["--nprocs", "2"], "--nprocs is not a flag"),
        (["--nproc", "two"], "nproc_per_node is 'two'"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_started_where_processes_would_not_meet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nnodes", "2", "--rdzv-endpoint", "no-such-host.invalid:29400"]) == 1
    shown = capsys.readouterr().out
    assert "no-such-host.invalid does not resolve" in shown
    assert "training cannot start: meeting point, processes" in shown


# --- whole examinations in processes of their own ---------------------------------------------------------------

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from accelerator.cli import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_two_processes_with_few_open_files(fresh: FreshProcesses) -> None:
    (run,) = fresh(LIMITED, "--nproc", "2", env={"OMP_NUM_THREADS": None}, timeout=110, warm=True)
    assert run.returncode == 1, run.stderr
    assert "2 joined under DDP" in run.stdout
    number = len(probes(World()))
    assert f"{number} of {number} right" in run.stdout
    assert "at most 200 on rank 0" in run.stdout
    assert run.stdout.endswith("training cannot start: open files\n")
    assert run.stderr == ""


UNLIKE = """
import os, sys
if os.environ["RANK"] == "1":
    import pathlib, torch
    info = pathlib.Path("other/safetensors-0.0.1.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: safetensors\\nVersion: 0.0.1\\n")
    sys.path.insert(0, "other")
    torch.set_num_threads(64)
from accelerator.cli import main
sys.exit(main(["doctor"]))
"""


def test_a_rank_whose_machine_is_unlike_the_others(fresh: FreshProcesses) -> None:
    """Inside a job that another launcher started, as under torchrun or srun."""
    first, second = fresh(UNLIKE, nproc=2, timeout=110, warm=True)
    assert first.returncode == 1, first.stderr
    assert "safetensors differs: " in first.stdout
    assert "0.0.1 on rank 1" in " ".join(first.stdout.split())
    assert "1 + 64 threads on" in first.stdout
    assert "training cannot start: versions" in first.stdout
    assert (second.returncode, second.stdout) == (0, "")


def test_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ACCELERATOR_DDP__DEVICE", "hpu")
    assert main(["doctor", "--nproc", "1", "--strategy", "ddp"]) == 1
    out, err = capfd.readouterr()
    assert "device is 'hpu', but this machine has" in err
    assert "training cannot start: processes" in out


def test_a_rank_that_never_comes(fresh: FreshProcesses) -> None:
    job = fresh.start(["-m", "accelerator", "doctor", "--seconds", "3"], nproc=2, warm=True)
    job.send_signal(9, rank=1)
    alive, _ = job.wait(110)
    assert alive.returncode == 1
    assert "Timeout (0:00:03)!" in alive.stderr
    assert "strategy.setup()" in alive.stderr or "in setup" in alive.stderr
