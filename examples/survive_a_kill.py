"""A training that is killed again and again, and ends with the weights of one that never was.

Each process trains, saves after every step, and goes on from the newest whole checkpoint when it is started again; a
timer kills it with SIGKILL, wherever it is. Expected output of

    python examples/survive_a_kill.py

    killed 3 times, finished 40 steps
    weights equal those of a run that was never killed: True
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import nn

from accelerator import Accelerator

NUM_STEPS = 40


def train(folder, kill_after):
    accelerator = Accelerator("cpu", project_dir=folder, seed=0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.1), nn.Tanh(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.resume()
    if kill_after:
        threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while scheduler.last_epoch < NUM_STEPS:
        with accelerator.accumulate(model):
            loss = model(torch.randn(32, 64)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.save_state(keep_last=2)
    accelerator.save_model(model, Path(folder) / "model")


def start(folder, kill_after=0.0):
    command = [sys.executable, __file__, "--train", str(folder), "--kill-after", str(kill_after)]
    return subprocess.run(command, check=False).returncode


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", metavar="FOLDER")
    parser.add_argument("--kill-after", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.train:
        return train(arguments.train, arguments.kill_after)
    with tempfile.TemporaryDirectory() as folder:
        never, often = Path(folder) / "never", Path(folder) / "often"
        start(never)
        kills = sum(start(often, kill_after) == -signal.SIGKILL for kill_after in (0.05, 0.09, 0.13))
        start(often)
        print(f"killed {kills} times, finished {NUM_STEPS} steps")
        print("weights equal those of a run that was never killed:", weights(never) == weights(often))


if __name__ == "__main__":
    main()
