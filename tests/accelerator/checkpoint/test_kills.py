"""`kill -9` of a worker at random moments under `accelerator launch --max-restarts`: the same weights in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import accelerator.config
from rank_pool import without_launch_variables

ROOT = Path(accelerator.config.__file__).parents[2]

SCRIPT = """
import os, random, signal, sys, threading
from pathlib import Path

import torch
from torch import nn

from accelerator import Accelerator

folder, strategy, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
accelerator = Accelerator(strategy, project_dir=folder, seed=0, split_batches=True, gradient_accumulation_steps=2)


class Seen:
    indices = []

    def state_dict(self):
        return {"indices": list(self.indices)}

    def load_state_dict(self, state):
        self.indices = state["indices"]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return torch.full((16,), index / 48).sin(), index


net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.2), nn.Tanh(), nn.Linear(32, 1))
loader = torch.utils.data.DataLoader(Numbers(), 4, shuffle=True)
model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01), loader)
seen = Seen()
accelerator.register_for_checkpointing(seen)
accelerator.resume()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < kills and accelerator.process_index == attempt % 2:
    after = random.Random(f"{strategy} {attempt}").random() * 0.6
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
while loader.state_dict()["epoch"] < 1:
    for batch, indices in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        seen.indices = seen.indices + accelerator.gather_for_metrics(indices).tolist()
        number = len(seen.indices)
        path = folder / "checkpoints" / f"step-{number:09d}"
        accelerator.save_state(path, keep_last=2, async_=number % 8 == 0)
if attempt < kills:
    threading.Event().wait()  # for the kill, if the loop was faster
weights = accelerator.get_state_dict(model)
accelerator.end_training()
if accelerator.is_main_process:
    torch.save((weights, seen.indices, attempt), folder / "final.pt")
"""


@pytest.mark.parametrize(("strategy", "number"), [("ddp", 2), ("fsdp", 1)])
def test_killed_runs_end_with_the_weights_of_one_that_was_not(tmp_path: Path, strategy: str, number: int) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    results = []
    for kills in (0, number):
        folder = tmp_path / str(kills)
        command = ["-m", "accelerator", "launch", "--nproc-per-node", "2", "--max-restarts", str(kills), "train.py"]
        done = subprocess.run(
            [sys.executable, *command, str(folder), strategy, str(kills)],
            cwd=tmp_path,
            env=without_launch_variables(dict(os.environ)) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        results.append(torch.load(folder / "final.pt"))
    (whole, all_seen, _), (weights, seen, attempt) = results
    assert attempt == number
    assert seen == all_seen
    assert sorted(seen) == list(range(48))
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
