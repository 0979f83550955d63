"""`kill -9` of a worker at random moments under `accelerator launch --max-restarts`: the same weights in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fresh_process import FreshProcesses
from rank_pool import TESTS

SCRIPT = """
import os, random, signal, sys, threading

import torch

folder, strategy, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.append(sys.argv[4])

from killed_loop import train

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def begin(rank):
    if attempt < kills and rank == attempt % 2:
        after = random.Random(f"{strategy} {attempt}").random() * 0.6
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()


weights, samples = train(strategy, folder, 48, begin)
if attempt < kills:
    threading.Event().wait()  # for the kill, if the loop was faster
if os.environ["RANK"] == "0":
    torch.save((weights, samples, attempt), f"{folder}/final.pt")
"""


@pytest.mark.parametrize(("strategy", "number"), [("ddp", 2), ("fsdp", 1)])
def test_killed_runs_end_with_the_weights_of_one_that_was_not(
    fresh: FreshProcesses, tmp_path: Path, strategy: str, number: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = []
    for kills in (0, number):
        folder = tmp_path / str(kills)
        words = str(folder), strategy, str(kills), str(TESTS / "support")
        launch = ["-m", "accelerator", "launch", "--nproc-per-node", "2", "--max-restarts", str(kills), str(script)]
        if kills:
            finished = fresh(launch, *words, timeout=240, warm=True)
        else:
            finished = fresh(script, *words, nproc=2, timeout=240, warm=True)
        assert all(one.returncode == 0 for one in finished), finished[0].stderr
        results.append(torch.load(folder / "final.pt"))
    (whole, all_seen, _), (weights, seen, attempt) = results
    assert attempt == number
    assert seen == all_seen
    assert sorted(seen) == list(range(48))
    assert all(torch.equal(one, two) for one, two in zip(weights, whole, strict=True))
