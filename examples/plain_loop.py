"""Teach a small convolutional network to read scanned digits, on one device.

`train_digits.py` is this script with `Accelerator` around the loop; this shows what that takes:

    diff -w examples/plain_loop.py examples/train_digits.py

Expected output of `python examples/plain_loop.py`, ten lines, the last of them like

    epoch 10  loss 0.011  test accuracy 98.6%  9000 samples/s
"""

import argparse
import json
import sys
import time

import torch
from rich.progress import BarColumn, Progress
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

NUM_EPOCHS = 10


def load_data():
    """1,437 images for training and 360 for testing, each (1, 8, 8) with values in [-1, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return random_split(TensorDataset(images, torch.tensor(labels)), [1437, 360])


def block(num_inputs, num_outputs, stride):
    return nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1), nn.GroupNorm(4, num_outputs), nn.SiLU()


def make_model():
    return nn.Sequential(*block(1, 32, stride=1), *block(32, 64, stride=2), nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def progress_bar(visible=True):
    """A bar on a terminal; elsewhere the line per epoch has to do."""
    columns = ("training", BarColumn(), "loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} samples/s")
    return Progress(*columns, disable=not (visible and sys.stdout.isatty()), transient=True)


def main(curve_path):
    torch.manual_seed(0)
    train, test = load_data()
    train_loader = DataLoader(train, batch_size=64, shuffle=True)
    test_loader = DataLoader(test, batch_size=120)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS * len(train_loader))
    curve = []  # the mean loss of every optimizer step
    with progress_bar() as bar:
        task = bar.add_task("", total=NUM_EPOCHS * len(train_loader), loss=0, speed=0)
        for epoch in range(1, NUM_EPOCHS + 1):
            model.train()
            start, num_seen = time.perf_counter(), 0
            for images, labels in train_loader:
                losses = cross_entropy(model(images), labels, reduction="none")
                losses.mean().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                curve.append(losses.mean().item())
                num_seen += len(losses)
                speed = num_seen / (time.perf_counter() - start)
                bar.update(task, advance=1, loss=curve[-1], speed=speed)
            model.eval()
            right = []
            with torch.no_grad():
                for images, labels in test_loader:
                    right += (model(images).argmax(1) == labels).tolist()
            accuracy = sum(right) / len(test)
            line = f"epoch {epoch}  loss {curve[-1]:.3f}  test accuracy {accuracy:.1%}  {speed:.0f} samples/s"
            print(line)
    if curve_path:
        with open(curve_path, "w") as file:
            json.dump({"losses": curve, "accuracy": accuracy}, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--curve", metavar="PATH", help="JSON file for the loss of every optimizer step")
    main(parser.parse_args().curve)
