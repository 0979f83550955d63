"""Did the resumed run really go on? Its first step is compared with the one that followed the checkpoint.

The first run saves after step 3 and takes one more step, which certifies the checkpoint. It is resumed as it was, with
another dataset of the same size, and with a loss that was changed in between. Expected output:

    the first step after step-000000003: exact (compared: data, losses, gradient norm)
    other data: wrong data: the batch after position 24 ...
    other loss: drifted: 1.0e-03 apart, relative (compar...
"""

import logging
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from strategies import StateError

logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("accelerator").setLevel(logging.INFO)  # what is as it should be is reported as info


def train(folder, data, scale=1.0):
    """Four steps, saved after the third; or the fourth alone, from the checkpoint."""
    accelerator = Accelerator("cpu", project_dir=folder, seed=0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(data), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    resumed = accelerator.resume(on_drift="error") is not None
    for step, (inputs,) in enumerate(loader, 4 if resumed else 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean() * scale)
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            accelerator.save_state()
        if step == 4:
            break
    accelerator.end_training()


def main():
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        train(folder, data)
        train(folder, data)
        for name, arguments in (("other data", (data + 1,)), ("other loss", (data, 1.001))):
            try:
                train(folder, *arguments)
            except StateError as error:
                print(f"{name}: {str(error).partition(': ')[2][:40]}...")


if __name__ == "__main__":
    main()
