"""Six ways to wait for ever: the rank and the line are named, and with `hang_timeout` every process ends."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accelerator import Accelerator
from accelerator.debugging.hang_table import Report, table, verdict
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import DDP, ConfigurationError, PeerLostError, ShapeMismatchError

TIMEOUT = 2
FOR_EVER = 60


def line(mark: str) -> str:
    """The line of this file that ends in a comment with `mark`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, text in enumerate(lines, 1) if text.endswith(f"# {mark}")]
    return f"{Path(__file__).name}:{number} in "


def start() -> Accelerator:
    accelerator = Accelerator(DDP(device="cpu"), hang_timeout=TIMEOUT, first_step_timeout=TIMEOUT)
    accelerator.wait_for_everyone()
    print("begun at", time.time(), flush=True)
    return accelerator


def ended_in_time(printed: str) -> None:
    """Within ten seconds of the timeout, counted from when the last rank had begun."""
    begun = float(printed.rpartition("begun at ")[2].split()[0])
    assert time.time() - begun < TIMEOUT + 10


def conditional_collective() -> None:
    accelerator = start()
    if accelerator.is_main_process:
        accelerator.gather(torch.ones(7, 3))  # only rank 0
    time.sleep(FOR_EVER)  # the other rank goes on


def uneven_loop() -> None:
    accelerator = start()
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3 - accelerator.process_index):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 2)).mean())  # one iteration more
            optimizer.step()
    time.sleep(FOR_EVER)  # after the loop


class Deadlocked(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        lock = threading.Lock()
        with lock:
            if index == 6:
                lock.acquire()  # for the second time
        return torch.ones(2)


def deadlocked_dataset() -> None:
    accelerator = start()
    model = nn.Linear(2, 1)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Deadlocked(), batch_size=2)
    )
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())  # without the other's batch
            optimizer.step()


def deadlocked_worker() -> None:
    accelerator = start()
    model = nn.Linear(2, 1)
    data = DataLoader(Deadlocked(), batch_size=2, num_workers=2, worker_init_fn=say_hello)  # worker 0 has no more to do
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    children: set[Any] = set()
    threading.Thread(target=watch_children, args=[children], daemon=True).start()
    multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True).start()  # reads nothing
    for batch in loader:  # whose worker is deadlocked
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())
            optimizer.step()


def say_hello(worker: int) -> None:
    print(f"hello {worker}", flush=True)


def watch_children(seen: set[Any]) -> None:
    while True:
        if new := set(multiprocessing.active_children()) - seen:
            seen |= new
            print("".join(f"worker {child.pid}\n" for child in new), end="", flush=True)
        time.sleep(0.05)


def stopped_process() -> None:
    accelerator = start()
    if accelerator.process_index == 1:
        # Woken when the others have ended, it finds that they did.
        orders = f"sleep 0.5; kill -STOP {os.getpid()}; sleep {2 * TIMEOUT + 2}; kill -CONT {os.getpid()}"
        subprocess.run(["sh", "-c", orders], check=True)  # until it is stopped
    accelerator.wait_for_everyone()  # for the stopped one


def beside_python() -> None:
    accelerator = start()
    if accelerator.is_main_process:
        dist.all_reduce(torch.ones(3), async_op=True)  # beside Python
    time.sleep(FOR_EVER)  # in no collective


# The function; what the verdict says of the rank that waits and of the one it waits for, each with a line; the table's
# row of the one that waits
HANGS: dict[str, tuple[Callable[[], None], list[tuple[str, str]], str]] = {
    "conditional collective": (
        conditional_collective,
        [
            ("Rank 0 waits in gather (all_gather) at ", "only rank 0"),
            ("Rank 1 is in no collective, at ", "the other rank goes on"),
        ],
        "gather (all_gather) of (7, 3) float32",
    ),
    "uneven loop": (
        uneven_loop,
        [("Rank 0 waits in backward at ", "one iteration more"), ("Rank 1 is in no collective, at ", "after the loop")],
        "backward",
    ),
    "deadlock in the dataset": (
        deadlocked_dataset,
        [
            ("Rank 0 waits in forward (DistributedDataParallel) at ", "without the other's batch"),
            ("Rank 1 is in no collective, at ", "for the second time"),
        ],
        "forward (DistributedDataParallel)",
    ),
    "stopped process": (
        stopped_process,
        [
            ("Rank 0 waits in wait_for_everyone (all_gather) at ", "for the stopped one"),
            ("Rank 1 is stopped (SIGSTOP, a debugger, or ctrl-z), last seen at ", "until it is stopped"),
        ],
        "wait_for_everyone (all_gather)",
    ),
}


def test_a_deadlock_in_a_worker_is_told_and_the_worker_ended(fresh: FreshProcesses) -> None:
    """Left alive, it would keep what reads the job's output waiting, too."""
    script = "import test_hangs\nif __name__ == '__main__':\n    test_hangs.deadlocked_worker()\n"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    (ended,) = fresh(script, env={"PYTHONPATH": paths})
    assert ended.returncode == 1, ended.stderr
    assert sorted(re.findall(r"hello \d", ended.stdout)) == ["hello 0", "hello 1"]
    place = ended.stderr.partition("Rank 0 is in no collective, at ")[2].splitlines()[0]
    loop, _, dataset = place.partition(
        " in deadlocked_worker, waiting for a batch of a DataLoader's worker, which is at "
    )
    assert line("whose worker is deadlocked").removesuffix(" in ") in loop
    assert line("for the second time") in dataset
    assert dataset.endswith("in __getitem__.")
    workers = [int(pid) for pid in re.findall(r"^worker (\d+)$", ended.stdout, re.MULTILINE)]
    assert workers
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


def test_a_collective_beside_python_is_named_from_the_flight_recorder(ranks: RankPool) -> None:
    ranks(leave, return_exceptions=True)  # a process reads the size of the recorder once, where others ran before
    ended = [
        str(error)
        for error in ranks(beside_python, return_exceptions=True, timeout=FOR_EVER, env={"TORCH_FR_BUFFER_SIZE": "100"})
    ]
    told = next(text for text in ended if "HangError" in text)
    rank_0, rank_1 = (told.partition(f"Rank {rank} is in no collective, at ")[2] for rank in (0, 1))
    assert line("in no collective") in rank_0.partition(", while")[0]
    assert re.match(r" all_reduce of \(3,\) Float, called at .*", rank_0.partition(", while")[2])
    assert line("beside Python") in rank_0.partition("called at ")[2].partition("has not ended")[0]
    assert "has not ended" not in rank_1.splitlines()[0]


@pytest.mark.parametrize("name", HANGS)
def test_rank_and_line_of_a_hang_are_named_and_all_end(name: str, ranks: RankPool) -> None:
    hang, expected, row = HANGS[name]
    ended = [str(error) for error in ranks(hang, return_exceptions=True, timeout=FOR_EVER)]
    ended_in_time(ended[1])
    assert all("exit code 1" in text for text in ended), ended
    assert "HangError: no progress for 2 s" in ended[0]
    assert "HangError" not in ended[1].partition("printed:")[2]  # one table
    assert re.search(rf"^0 +{re.escape(row)}  +2 s", ended[0], re.MULTILINE), (row, ended[0])
    for words, mark in expected:
        place = ended[0].partition(words)[2].partition(";")[0]
        assert line(mark) in place.splitlines()[0], (words, mark, ended[0])


def leave() -> None:
    os._exit(0)


def dead_rank() -> None:
    accelerator = start()
    if accelerator.process_index == 1:
        os._exit(0)
    begun = time.monotonic()
    try:
        accelerator.wait_for_everyone()  # for the dead one
    finally:
        assert time.monotonic() - begun < TIMEOUT + 10


def mismatched_shapes() -> None:
    accelerator = start()
    accelerator.gather(torch.ones(3 + accelerator.process_index))  # of another shape


@pytest.mark.parametrize(
    ("function", "kind", "words", "mark"),
    [
        (dead_rank, PeerLostError, "cannot end: rank 1 left", "for the dead one"),
        (mismatched_shapes, ShapeMismatchError, r"rank 0: \(3,\) .*; rank 1: \(4,\)", "of another shape"),
    ],
)
def test_what_need_not_wait_is_an_error_at_its_line(
    function: Callable[[], None], kind: type[Exception], words: str, mark: str, ranks: RankPool
) -> None:
    error = ranks(function, return_exceptions=True)[0]
    assert isinstance(error, kind)
    assert re.search(words, str(error))
    assert line(mark).removesuffix(" in ").rpartition(":")[2] in re.findall(r"line (\d+), in", str(error.__cause__))


def slow_but_moving() -> float:
    accelerator = Accelerator(DDP(device="cpu"), hang_timeout=1, first_step_timeout=1)
    total = 0.0
    start = time.monotonic()
    while time.monotonic() - start < 2.5:
        total += sum(range(1000))
    accelerator.end_training()
    return total


def test_a_process_that_moves_is_left_alone_and_one_that_left_is_not_watched(ranks: RankPool) -> None:
    assert all(total > 0 for total in ranks(slow_but_moving, nproc=1))
    assert ranks(leave_then_wait, nproc=1) == ["alive"]


def short_calls_while_another_waits() -> str:
    accelerator = Accelerator(DDP(device="cpu"), hang_timeout=1, first_step_timeout=1)
    if accelerator.is_main_process:
        for _ in range(6):
            time.sleep(0.5)  # a query, say, and nothing else
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return "alive"


def test_no_rank_is_ended_while_one_makes_short_calls(ranks: RankPool) -> None:
    assert ranks(short_calls_while_another_waits) == ["alive", "alive"]


def leave_then_wait() -> str:
    accelerator = Accelerator(DDP(device="cpu"), hang_timeout=1, first_step_timeout=1)
    accelerator.end_training()
    time.sleep(1.5)
    return "alive"


def at(rank: int, where: str = "train.py:5 in main", waits_in: str = "gather (all_gather)", **more: Any) -> Report:
    return Report(rank, where, waits_in, **more)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        (
            [at(0), at(2), at(1, "train.py:9 in main", "")],
            "Ranks 0, 2 wait in gather (all_gather) at train.py:5 in main. Rank 1 is in no collective, at train.py:9 "
            "in main.",
        ),
        (
            [at(0), at(1, "train.py:7 in main", "reduce (all_reduce)")],
            "Ranks wait in different collectives: Rank 0 waits in gather (all_gather) at train.py:5 in main; Rank 1 "
            "waits in reduce (all_reduce) at train.py:7 in main.",
        ),
        (
            [at(0, brought="(3,) float32"), at(1, brought="(4,) float32")],
            "Ranks 0, 1 wait in gather (all_gather) at train.py:5 in main, to which they brought different tensors "
            "(rank 0: (3,) float32; rank 1: (4,) float32).",
        ),
        (
            [at(0), at(1, state="left")],
            "Rank 0 waits in gather (all_gather) at train.py:5 in main. Rank 1 left the job, at train.py:5 in main.",
        ),
        ([at(0), at(1)], "Ranks 0, 1 wait in gather (all_gather) at train.py:5 in main, and none is missing: look at"),
        ([at(0, waits_in="")], "Rank 0 is in no collective, at train.py:5 in main."),
    ],
)
def test_the_verdict(reports: list[Report], expected: str) -> None:
    assert verdict(reports).startswith(expected)
    assert len(table(reports).splitlines()) == len(reports) + 1


def test_the_launcher_repeats_the_cause(fresh: FreshProcesses, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        "import time\nfrom accelerator import Accelerator\naccelerator = Accelerator('ddp')\n"
        "if accelerator.is_main_process:\n    accelerator.wait_for_everyone()\ntime.sleep(60)\n"
    )
    command = ["-m", "accelerator", "launch", "--nproc-per-node", "2", "--hang-timeout", "2"]
    (finished,) = fresh([*command, "--first-step-timeout", "3", str(script)], timeout=100, warm=True)
    assert finished.returncode == 1
    assert finished.stderr.count("rank  waits in") == 1
    assert f"Rank 0 waits in wait_for_everyone (all_gather) at {script}:5 in <module>" in finished.stderr
    assert f"Rank 1 is in no collective, at {script}:6 in <module>" in finished.stderr
    assert "accelerator launch: rank 0 failed first: exit code 1, HangError: no progress for 3 s" in finished.stderr


def test_the_first_timeout_alone_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"first_step_timeout is 5 \(code\) and hang_timeout is None"):
        Accelerator("cpu", first_step_timeout=5)
