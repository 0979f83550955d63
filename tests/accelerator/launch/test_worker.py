"""The first lines of a launched process, and the order in which failures are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from accelerator.launch import worker
from accelerator.launch.report import Failure
from accelerator.launch.worker import is_follow_up, record
from strategies.errors import PeerLostError


def chained(cause: BaseException) -> BaseException:
    try:
        raise KeyError("later") from cause
    except KeyError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:28039"), True),
        (PeerLostError("rank 1 left"), True),
        (chained(PeerLostError("rank 1 left")), True),
        (ConnectionResetError("Connection reset by peer"), False),  # the script's own connection to somewhere
        (RuntimeError("shapes do not match"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_that_only_tell_of_a_lost_peer(error: BaseException, expected: bool) -> None:
    assert is_follow_up(error) is expected


def test_one_process_of_a_node_prints(tmp_path: Path) -> None:
    paths = [tmp_path / str(rank) / "error.json" for rank in range(3)]
    for path in paths:
        path.parent.mkdir()
    prints = [record(str(path), ValueError("no"), "text", index == 0) for index, path in enumerate(paths)]
    assert prints == [False, True, False]
    message = json.loads(paths[1].read_text())["message"]
    assert message["message"] == "ValueError: no"
    assert message["extraInfo"]["py_callstack"] == "text"
    int(message["extraInfo"]["timestamp"])  # torch reads it so


def failure(rank: int, noticed: int, exit_code: int = 1, seconds: float = 0.0, follow_up: bool = False) -> Failure:
    return Failure(rank, exit_code, noticed, seconds, summary="" if exit_code < 0 else "Error: no", follow_up=follow_up)


def test_causes_come_before_consequences() -> None:
    raised, later = failure(2, noticed=3, seconds=5.0), failure(1, noticed=1, seconds=6.0)
    ended = failure(0, noticed=2, exit_code=-signal.SIGTERM, seconds=1.0)
    lost = failure(3, noticed=0, follow_up=True)
    assert sorted([ended, lost, later, raised], key=lambda one: one.order) == [raised, later, lost, ended]
    assert sorted([ended, lost], key=lambda one: one.order) == [lost, ended]  # the cause is on another node
    assert [one.ending for one in (raised, ended)] == ["exit code 1, Error: no", "killed by SIGTERM"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_process_does_not_outlive_a_launcher_that_ended_before_its_first_line(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "t.py").write_text(
        f"import os, time; time.sleep(1); print('trained', '{worker.LAUNCHER}' in os.environ)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    variables = {
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
        worker.LAUNCHER: str(os.getpid() if is_there else launcher.pid),
    }
    done = subprocess.run(
        [sys.executable, worker.__file__, "script", str(tmp_path / "t.py")],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == ((0, "trained False\n") if is_there else (-signal.SIGKILL, ""))
