"""Go on in the middle of an epoch on another number of processes: every sample once, in the same order.

    accelerator launch --nproc-per-node 3 examples/change_world_size.py runs/moved
    accelerator launch --nproc-per-node 2 examples/change_world_size.py runs/moved
    python examples/change_world_size.py runs/moved

Each takes two global batches of the same epoch, and saves its place; the last takes the rest. Expected output:

    3 processes took 24 samples, from 0 on
    2 processes took 16 samples, from 24 on
    1 processes took 60 samples, from 40 on
    epoch 0: 100 samples, 100 of them different, 0 dropped, resumed 2 times
"""

import json
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from accelerator import Accelerator
from accelerator.ledger import account


def main(folder):
    accelerator = Accelerator(seed=0, project_dir=folder, data_ledger=True)
    loader = accelerator.prepare(DataLoader(range(100), batch_size=4, shuffle=True))
    place, size = folder / "place.json", accelerator.num_processes
    if place.exists():
        loader.load_state_dict(json.loads(place.read_text()))
    begin, taken = loader.state_dict()["position"], 0
    for step, batch in enumerate(loader, 1):
        taken += len(accelerator.gather_for_metrics(batch))
        if size > 1 and step == 2:
            break
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        place.write_text(json.dumps(loader.state_dict()))
        print(f"{size} processes took {taken} samples, from {begin} on")
        if size == 1:
            for one in account(folder):
                print(
                    f"epoch {one.epoch}: {one.samples} samples, {one.different} of them different, "
                    f"{one.dropped} dropped, resumed {one.resumed} times"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
