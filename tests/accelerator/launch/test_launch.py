"""Real jobs: what two processes compute, how a job ends, and what is said about it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import accelerator.config
from fresh_process import Finished, FreshProcesses, Job
from rank_pool import without_launch_variables
from torch_version import ended_peers_are_listed, without_gloo_lines

ROOT = Path(accelerator.config.__file__).parents[2]


@dataclass
class Launcher:
    """Starts `python -m accelerator launch` in `folder`, and ends what a failing test left running.

    A job that is only run to its end has a launcher that is forked; its processes are started as always.
    """

    folder: Path
    fresh: FreshProcesses
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, text: str, name: str = "train.py") -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        environ = without_launch_variables(dict(os.environ)) | {"PYTHONPATH": str(ROOT)} | variables
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerator", "launch", *words],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> Finished:
        out, err = process.communicate(timeout=60)
        return Finished(process.returncode, without_gloo_lines(out), err, 0.0)

    def fork(self, *words: str, **variables: str) -> Job:
        as_users_have_it = dict.fromkeys(("OMP_NUM_THREADS", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED"))
        command = ["-m", "accelerator", "launch", *words]
        return self.fresh.start(command, cwd=self.folder, env=as_users_have_it | variables, warm=True)

    def __call__(self, *words: str, **variables: str) -> Finished:
        (finished,) = self.fork(*words, **variables).wait()
        return finished


@pytest.fixture
def launch(tmp_path: Path, fresh: FreshProcesses) -> Iterator[Launcher]:
    """`launch("--nproc-per-node", "2", "train.py")` runs a job to its end; `launch.start` only starts it."""
    launcher = Launcher(tmp_path, fresh)
    yield launcher
    for process in launcher.running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the launcher ends its workers
            process.wait(timeout=40)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 40.0) -> None:
    """Poll until `condition` holds. Raises `TimeoutError` naming `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)


ALL_REDUCE = """
    import os, sys, time
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    rank, total = dist.get_rank(), torch.ones(1)
    dist.all_reduce(total)
"""


def test_two_processes_reduce_and_the_script_is_run_as_python_would(launch: Launcher) -> None:
    launch.script(
        ALL_REDUCE
        + """
    import json, pickle
    def double(x):
        return 2 * x
    if __name__ == "__main__":
        facts = {"total": total.item(), "argv": sys.argv, "file": __file__, "path": sys.path[0],
                 "flags": json.loads(os.environ["ACCELERATOR_LAUNCH_FLAGS"]),
                 "threads": os.environ["OMP_NUM_THREADS"], "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"],
                 "pickled": pickle.loads(pickle.dumps(double))(21)}
        open(f"{rank}.json", "w").write(json.dumps(facts))
        dist.destroy_process_group()
    """,
        "sub/train.py",
    )
    (launch.folder / "temporary").mkdir()
    words = ["--nproc-per-node", "2", "--seed", "3", "sub/train.py", "--seed", "4", "a b", "--", "-m"]
    done = launch(*words, TMPDIR=str(launch.folder / "temporary"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((launch.folder / "temporary").iterdir()) == []  # nothing is left behind
    for rank in range(2):
        facts = json.loads((launch.folder / f"{rank}.json").read_text())
        assert facts == {
            "total": 2.0,
            "argv": ["sub/train.py", "--seed", "4", "a b", "--", "-m"],
            "file": str(launch.folder / "sub" / "train.py"),
            "path": str(launch.folder / "sub"),
            "flags": {"launch.nproc_per_node": "2", "seed": "3"},
            "threads": str(max(1, len(os.sched_getaffinity(0)) // 2)),
            "restarts": "0",
            "pickled": 42,
        }


@ended_peers_are_listed
def test_the_failing_ranks_traceback_comes_once_and_first(launch: Launcher) -> None:
    launch.script(
        ALL_REDUCE
        + """
    def fail():
        try:
            raise ValueError("the learning rate is a fish")
        finally:
            dist.destroy_process_group()  # peers notice before this process has said anything
    fail() if rank == 1 else dist.all_reduce(total)
    """
    )
    done = launch("--nproc-per-node", "2", "train.py")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "rank 1 of 2 failed:"
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert f'File "{launch.folder}/train.py", line ' in done.stderr
    assert "worker.py" not in done.stderr
    assert "runpy" not in done.stderr
    assert lines[-2] == (
        "accelerator launch: rank 1 failed first: exit code 1, "
        "ValueError: the learning rate is a fish (traceback above)"
    )
    assert lines[-1].startswith("accelerator launch: rank 0 followed: ")


def test_one_traceback_if_all_ranks_fail_alike(launch: Launcher) -> None:
    launch.script("import nowhere_to_be_found")
    done = launch("--nproc-per-node", "2", "train.py")
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count("(traceback above)") == 1
    assert done.stderr.startswith("rank ")


def test_a_syntax_error_is_shown_as_python_shows_it(launch: Launcher) -> None:
    launch.script("x = = 1")
    done = launch("train.py")
    assert done.returncode == 1
    assert f'File "{launch.folder}/train.py", line 1\n    x = = 1\n' in done.stderr
    assert "exec(" not in done.stderr


def test_a_lost_peer_alone_is_still_shown(launch: Launcher) -> None:
    launch.script(
        """
        import os, time
        if os.environ["RANK"] == "0":
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")
        time.sleep(30)
        """
    )
    done = launch("--nproc-per-node", "2", "train.py")
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "rank 1 failed first: killed by SIGTERM" not in done.stderr
    assert done.returncode == 1


@ended_peers_are_listed
def test_exit_codes_pass_through(launch: Launcher) -> None:
    launch.script("import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(30)")
    done = launch("--nproc-per-node", "2", "train.py")
    assert done.returncode == 7
    assert done.stderr == (
        "accelerator launch: rank 1 failed first: exit code 7\naccelerator launch: rank 0 followed: killed by SIGTERM\n"
    )


def test_a_script_may_set_its_own_exception_hook(launch: Launcher) -> None:
    launch.script("import sys\nsys.excepthook = lambda *_: print('my hook', file=sys.stderr)\n1 / 0")
    done = launch("train.py")
    assert done.stderr.startswith("rank 0 of 1 failed:\nmy hook\naccelerator launch: rank 0 failed first: exit code 1")


@ended_peers_are_listed
def test_a_killed_process_gives_128_and_the_signal(launch: Launcher) -> None:
    launch.script(
        ALL_REDUCE + "    if rank == 1:\n        os.kill(os.getpid(), 9)\n    dist.all_reduce(total)\n",
    )
    done = launch("--nproc-per-node", "2", "train.py")
    assert done.returncode == 128 + 9
    assert "Traceback" not in done.stderr
    assert "accelerator launch: rank 1 failed first: killed by SIGKILL, which leaves no traceback; " in done.stderr
    assert "accelerator launch: rank 0 followed: " in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_launcher_reach_every_process(launch: Launcher, number: signal.Signals) -> None:
    launch.script(
        """
        import os, signal, sys, time
        rank = os.environ["RANK"]
        def on(number, frame):
            open(f"{rank}.got", "w").write(str(number))
            sys.exit(0)
        signal.signal(signal.SIGTERM, on)
        signal.signal(signal.SIGINT, on)
        open(f"{rank}.ready", "w").close()
        time.sleep(60)
        """
    )
    process = launch.start("--nproc-per-node", "2", "train.py")
    wait_until(lambda: len(list(launch.folder.glob("*.ready"))) == 2, "both processes")
    process.send_signal(number)
    assert launch.finish(process).returncode == 128 + number
    assert [(launch.folder / f"{rank}.got").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_output_is_live(launch: Launcher) -> None:
    launch.script("import time, pathlib\nprint('tick')\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)")
    process = launch.start("train.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "tick\n"  # arrives while the script still waits for us
    (launch.folder / "go").touch()
    assert launch.finish(process).returncode == 0


def test_lines_of_two_processes_do_not_run_into_each_other(launch: Launcher) -> None:
    script = launch.script("""
        import os
        for line in range(3000):
            print("rank", os.environ["RANK"], "line", line)
    """)
    done = launch("--nproc-per-node", "2", script)
    lines = done.stdout.splitlines()
    assert len(lines) == 6000
    assert sorted(lines) == sorted(f"rank {rank} line {line}" for rank in range(2) for line in range(3000))


def test_processes_end_with_a_launcher_that_was_killed(launch: Launcher) -> None:
    launch.script(
        """
        import os, signal, sys, time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(f"pid-{os.environ['RANK']}.part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(file.name, file.name.removesuffix(".part"))
        while True:
            time.sleep(0.1)
        """
    )
    process = launch.start("--nproc-per-node", "2", "train.py")
    files = [launch.folder / f"pid-{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in files), "both processes")
    process.kill()
    launch.finish(process)  # which reads what they print until all have ended
    wait_until(lambda: not any(Path("/proc", file.read_text()).exists() for file in files), "their end")


def test_a_stopped_process_does_not_hold_the_end_of_the_job(launch: Launcher) -> None:
    """It heeds no SIGTERM while it is stopped; torch's agent waits 30 seconds for it."""
    script = launch.script("""
        import os, signal, sys, time
        from pathlib import Path

        mark, begun = Path("stopped"), time.monotonic()
        if os.environ["RANK"] == "1":
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        while not mark.exists() or not mark.read_text():
            time.sleep(0.05)
        while Path(f"/proc/{mark.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.05)
        print("failing at", time.time(), flush=True)
        sys.exit(3)
    """)
    finished = launch("--nproc-per-node", "2", script)
    assert time.time() - float(finished.stdout.rpartition("failing at ")[2]) < 20
    assert finished.returncode == 3
    assert "rank 1 followed: killed by SIGTERM" in finished.stderr


def test_a_restart_after_a_kill_runs_to_the_end(launch: Launcher) -> None:
    launch.script(
        ALL_REDUCE
        + """
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == 1:
        os.kill(os.getpid(), 9)
    dist.all_reduce(total)
    open(f"{rank}.done", "w").write(str(total.item()))
    dist.destroy_process_group()
    """
    )
    done = launch("--nproc-per-node", "2", "--max-restarts", "1", "train.py")
    assert done.returncode == 0
    assert done.stderr == (
        "accelerator launch: rank 1 failed (killed by SIGKILL); all processes start again (restart 1 of 1)\n"
    )
    assert [(launch.folder / f"{rank}.done").read_text() for rank in range(2)] == ["4.0", "4.0"]


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_two_jobs_and_two_nodes_on_one_machine(launch: Launcher, free_port: int, backend: str) -> None:
    launch.script(
        ALL_REDUCE
        + """
    dist.all_reduce(total)
    print("total", total.item(), "of", dist.get_world_size())
    dist.destroy_process_group()
    """
    )
    nodes = ["--nnodes", "2", "--rdzv-backend", backend, "--rdzv-endpoint", f"localhost:{free_port}", "train.py"]
    jobs = [
        launch.fork("--nproc-per-node", "1", "train.py"),
        launch.fork("--node-rank", "0", *nodes),
        launch.fork("--node-rank", "1", *nodes),
    ]
    done = [finished for job in jobs for finished in job.wait()]
    assert [job.returncode for job in done] == [0, 0, 0], [job.stderr for job in done]
    assert [job.stdout for job in done] == ["total 1.0 of 1\n", "total 4.0 of 2\n", "total 4.0 of 2\n"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_module_and_a_configuration_file(launch: Launcher) -> None:
    launch.script("", "pkg/__init__.py")
    launch.script("import sys\nprint(__name__, __spec__.name, sys.argv[1:], sys.path[0])", "pkg/train.py")
    launch.script("[launch]\nnproc_per_node = 2\n", "accelerator.toml")
    done = launch("-m", "pkg.train", "--lr", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"__main__ pkg.train ['--lr', '3'] {launch.folder}\n" * 2


def test_bad_input_ends_before_any_process_starts(launch: Launcher) -> None:
    launch.script("open('started', 'w')")
    done = launch("--nproc-per-node", "0", "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "accelerator launch: launch.nproc_per_node is '0' (--nproc-per-node); expected an integer >= 1 or none.\n"
    )
    assert not (launch.folder / "started").exists()
