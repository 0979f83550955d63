"""The harness itself: ranks that answer, fail, hang and die."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fresh_process import FreshProcesses
from rank_pool import RankPool, RemoteError, WorkerDied, WorkerHung
from strategies.errors import ShapeMismatchError


@dataclass
class Answer:
    """A class of a test module, to travel both ways."""

    value: int
    tensor: torch.Tensor


def add_rank(answer: Answer) -> Answer:
    rank = int(os.environ["RANK"])
    return Answer(answer.value + rank, answer.tensor + rank)


def sum_of_ranks() -> float:
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def environment() -> dict[str, str]:
    return dict(os.environ)


def raise_on(rank: int, error: Exception) -> None:
    if int(os.environ["RANK"]) == rank:
        raise error


def raise_while_peers_reduce() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ShapeMismatchError("rank 1 brought (3,)")
    dist.all_reduce(torch.zeros(2))


def sleep_on(rank: int, seconds: float) -> int:
    if int(os.environ["RANK"]) == rank:
        sleep_in_a_function_with_a_name(seconds)
    return os.getpid()


def sleep_in_a_function_with_a_name(seconds: float) -> None:
    time.sleep(seconds)


def raise_and_let_others_sleep(seconds: float) -> None:
    if int(os.environ["RANK"]) == 0:
        raise KeyError("first")
    time.sleep(seconds)


def kill_rank(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(2))


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("only one argument")


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


def assert_equal(left: int, right: int) -> None:
    assert left == right


def make_a_mess() -> None:
    os.environ["ACCELERATOR_MESS"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.manual_seed(99)
    random.seed(99)
    dist.init_process_group("gloo")


def look_around() -> tuple[object, ...]:
    return (
        "ACCELERATOR_MESS" in os.environ,
        os.getcwd(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.rand(1).item(),
        random.random(),
        dist.is_initialized(),
    )


def warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def say(text: str) -> None:
    print(text, os.environ["RANK"])


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_results_come_in_rank_order(ranks: RankPool, nproc: int) -> None:
    answers = ranks(add_rank, Answer(10, torch.ones(2)), nproc=nproc)
    assert [answer.value for answer in answers] == [10 + rank for rank in range(nproc)]
    assert [answer.tensor[0].item() for answer in answers] == [1.0 + rank for rank in range(nproc)]


def send_late() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank():
        time.sleep(0.2)
        dist.isend(torch.ones(1), 0)  # raises where the other end of the connection is gone


def test_a_rank_that_needs_no_other_stays_until_they_have_ended(ranks: RankPool) -> None:
    ranks(send_late)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_ranks_form_a_process_group(ranks: RankPool, nproc: int) -> None:
    assert ranks(sum_of_ranks, nproc=nproc) == [sum(range(nproc))] * nproc


@given(value=st.integers(0, 9))
@settings(max_examples=10)
def test_cases_may_be_generated(ranks: RankPool, value: int) -> None:
    assert [answer.value for answer in ranks(add_rank, Answer(value, torch.ones(1)))] == [value, value + 1]


def test_the_environment_is_torchruns(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATOR_STRATEGY", "fsdp")
    monkeypatch.setenv("SLURM_PROCID", "3")
    first, second = ranks(environment, env={"EXTRA": "1", "OMP_NUM_THREADS": None})
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == ("0", "0", "2", "2")
    assert (second["RANK"], second["LOCAL_RANK"], second["EXTRA"]) == ("1", "1", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert not {"ACCELERATOR_STRATEGY", "SLURM_PROCID", "OMP_NUM_THREADS"} & first.keys()


def test_an_error_keeps_its_type_and_brings_rank_and_traceback(ranks: RankPool) -> None:
    with pytest.raises(ShapeMismatchError, match=r"^got \(3,\)$") as caught:
        ranks(raise_on, 1, ShapeMismatchError("got (3,)"))
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert "in raise_on" in str(caught.value.__cause__)


def test_the_first_error_is_raised_and_not_what_followed_from_it(ranks: RankPool) -> None:
    with pytest.raises(ShapeMismatchError) as caught:
        ranks(raise_while_peers_reduce)
    assert "on rank 0 of 2" in str(caught.value.__cause__)


def test_errors_can_be_had_per_rank(ranks: RankPool) -> None:
    first, second = ranks(raise_on, 1, ValueError("no"), return_exceptions=True)
    assert first is None
    assert isinstance(second, ValueError)


def test_an_error_that_cannot_be_pickled_still_tells_its_story(ranks: RankPool) -> None:
    with pytest.raises(RemoteError, match="only one argument"):
        ranks(raise_unpicklable)


def test_a_failed_assertion_shows_its_values(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="assert 3 == 4"):
        ranks(assert_equal, 3, 4)


def test_a_hang_names_the_rank_and_shows_its_stack(ranks: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerHung, match="rank 1 still ran") as caught:
        ranks(sleep_on, 1, 60.0, timeout=1)
    assert "sleep_in_a_function_with_a_name" in str(caught.value)
    assert time.monotonic() - start < 10
    assert len(ranks(sleep_on, 5, 0.0)) == 2


def test_ranks_that_wait_for_a_failed_one_are_killed(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankPool, "grace_seconds", 0.5)
    failed, hung = ranks(raise_and_let_others_sleep, 60.0, return_exceptions=True)
    assert isinstance(failed, KeyError)
    assert isinstance(hung, WorkerHung)


def test_a_killed_worker_is_named_and_replaced(ranks: RankPool) -> None:
    before = ranks(sleep_on, 5, 0.0)
    with pytest.raises(WorkerDied, match="rank 1 died: SIGKILL") as caught:
        ranks(kill_rank, 1)
    assert "last words" in str(caught.value)
    after = ranks(sleep_on, 5, 0.0)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_worker_killed_while_idle_is_replaced(ranks: RankPool) -> None:
    ranks(sleep_on, 5, 0.0)
    os.kill(ranks.pids()[0], signal.SIGKILL)
    time.sleep(0.2)
    assert ranks(sum_of_ranks) == [1, 1]


def test_a_call_leaves_nothing_behind(ranks: RankPool) -> None:
    before = ranks(look_around)
    ranks(make_a_mess)
    assert ranks(look_around) == before
    assert before[0][:4] == (False, os.getcwd(), torch.float32, 1)
    assert not before[0][-1]


def test_warnings_are_errors_on_ranks_too(ranks: RankPool) -> None:
    with pytest.raises(UserWarning, match="careful"):
        ranks(warn)


@pytest.mark.filterwarnings("ignore:careful")
def test_warnings_can_be_ignored_by_a_mark(ranks: RankPool) -> None:
    ranks(warn)


def test_what_ranks_print_is_captured(ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(say, "hello from")
    assert "--- printed by rank 1 ---\nhello from 1" in capsys.readouterr().out


def test_a_local_function_is_refused(ranks: RankPool) -> None:
    with pytest.raises(TypeError, match="Use a function at module level"):
        ranks(lambda: 1)


def test_twenty_calls_take_no_time(ranks: RankPool) -> None:
    ranks(sum_of_ranks)
    start = time.monotonic()
    for _ in range(20):
        assert ranks(sum_of_ranks) == [1, 1]
    seconds = time.monotonic() - start
    print(f"20 calls of 2 ranks with an all_reduce each: {seconds:.2f} s")
    assert seconds < 60  # two fresh interpreters with torch take 3 s each time, on a machine that does nothing else


def test_environment_of_a_test_is_clean() -> None:
    assert not [name for name in os.environ if name.startswith(("ACCELERATOR_", "MASTER_", "SLURM_"))]


def test_fresh_runs_text_and_gives_exit_code_and_output(fresh: FreshProcesses) -> None:
    (finished,) = fresh("import sys\nprint('out', sys.argv[1])\nprint('err', file=sys.stderr)\nsys.exit(3)\n", "x")
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, "out x\n", "err\n")


def test_fresh_runs_ranks_that_meet(fresh: FreshProcesses) -> None:
    script = (
        "import torch, torch.distributed as dist\ndist.init_process_group('gloo')\nx = torch.ones(1)\n"
        "dist.all_reduce(x)\nprint(int(x))\ndist.destroy_process_group()\n"
    )
    finished = fresh(script, nproc=2)
    assert [(rank.returncode, rank.stdout.splitlines()[-1]) for rank in finished] == [(0, "2"), (0, "2")]


def test_fresh_processes_can_be_killed(fresh: FreshProcesses) -> None:
    job = fresh.start("import time\nprint('ready')\ntime.sleep(60)\n", nproc=2)
    job.wait_for("ready", rank=1)
    job.send_signal(signal.SIGKILL, rank=1)
    job.send_signal(signal.SIGTERM, rank=0)
    assert [rank.returncode for rank in job.wait(timeout=10)] == [-signal.SIGTERM, -signal.SIGKILL]


def test_fresh_names_ranks_that_hang_and_shows_stacks(fresh: FreshProcesses) -> None:
    script = "import time\ndef waiting_here():\n    time.sleep(60)\nwaiting_here()\n"
    with pytest.raises(TimeoutError, match=r"ranks \[0\] still ran after 2 s(.|\n)*waiting_here"):
        fresh(script, timeout=2)


ENDS = """
import atexit, os, sys, threading
atexit.register(print, "at exit")
threading.Timer(0.3, print, ("from a thread",)).start()
print(__name__, sys.argv, os.environ["RANK"], os.environ.get("MESS"))
how = sys.argv[1]
if how == "kill":
    os.kill(os.getpid(), 9)
if how == "raise":
    raise KeyError("no")
sys.exit({"words": "no", "code": 3, "end": None}[how])
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("code", 3), ("words", 1), ("raise", 1), ("kill", -9)])
def test_a_warm_process_ends_as_a_fresh_one_does(
    fresh: FreshProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int
) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.setenv("MESS", "1")
    ended = [fresh(tmp_path / "ends.py", how, nproc=2, cwd=tmp_path, warm=warm) for warm in (False, True)]
    for cold, warm in zip(*ended, strict=True):
        assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
        assert warm.returncode == code
        assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_a_warm_process_that_waits_gets_signals_and_is_killed_with_its_test(fresh: FreshProcesses) -> None:
    script = "import time, signal\nprint('ready')\ntime.sleep(60)\n"
    job = fresh.start(script, nproc=2, warm=True)
    for rank in range(2):
        job.wait_for("ready", rank)
    job.send_signal(signal.SIGTERM, rank=1)
    assert job.processes[1].wait(10) == -signal.SIGTERM
    assert job.processes[0].poll() is None
    job.kill()
    assert job.processes[0].poll() == -signal.SIGKILL
