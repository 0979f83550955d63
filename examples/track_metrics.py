"""Log a run to two trackers at once, stop it, go on, and read what is there.

    python examples/track_metrics.py

Nothing waits: the loss is copied from the device and written by a thread. The log of the resumed run has every step
once. Expected output:

    run of 30 steps, stopped after 20, checkpoint at 15
    log.jsonl: steps 1 to 30, none twice, resumed after 15
    tensorboard: 30 points of loss, and the weights' histogram at step 30
"""

import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from accelerator import Accelerator
from accelerator.lines import read_lines
from accelerator.trackers import Histogram

NUM_STEPS, CHECKPOINT, STOP = 30, 15, 20


def train(folder, last_step):
    accelerator = Accelerator("cpu", project_dir=folder, seed=0, trackers=("jsonl", "tensorboard"))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.log(config={"width": 32})
    accelerator.resume()
    while scheduler.last_epoch < last_step:
        with accelerator.accumulate(model):
            x = torch.randn(64, 8)
            loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss, "lr": scheduler.get_last_lr()[0]})
        if scheduler.last_epoch == CHECKPOINT:
            accelerator.save_state()
    if last_step == NUM_STEPS:
        accelerator.log({"weights": Histogram(model[0].weight)})
    accelerator.end_training()


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        train(folder, STOP)
        train(folder, NUM_STEPS)
        print(f"run of {NUM_STEPS} steps, stopped after {STOP}, checkpoint at {CHECKPOINT}")
        lines = read_lines(folder / "log.jsonl")
        steps = [line["step"] for line in lines if "loss" in line.get("values", ())]
        resumed = next(line["step"] for line in lines if line.get("event") == "resumed")
        twice = "some twice" if len(set(steps)) < len(steps) else "none twice"
        print(f"log.jsonl: steps {steps[0]} to {steps[-1]}, {twice}, resumed after {resumed}")
        board = EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        at = board.Histograms("weights")[0].step
        print(f"tensorboard: {len(board.Scalars('loss'))} points of loss, and the weights' histogram at step {at}")


if __name__ == "__main__":
    main()
