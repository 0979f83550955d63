"""Each process generates for its share of the prompts, and every process gets all results, in order.

The model is never prepared: nothing is trained. Expected output of

    accelerator launch --nproc-per-node 2 examples/distributed_inference.py

    process 0 of 2: 4 prompts
    process 1 of 2: 3 prompts
    [0]: 0 7 ...
    ...

with the same seven lines at the end on any number of processes.
"""

import torch
from torch import nn

from accelerator import Accelerator

VOCABULARY, WIDTH, LENGTH = 17, 32, 6


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.cell = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def generate(self, tokens):
        for _ in range(LENGTH):
            hidden, _ = self.cell(self.embed(tokens))
            tokens = torch.cat([tokens, self.head(hidden[:, -1:]).argmax(-1)], 1)
        return tokens


def main():
    accelerator = Accelerator(seed=0)
    model = Recurrent().to(accelerator.device).eval()
    prompts = [[0], [1, 2], [3], [4, 5, 6], [7], [8, 9], [10]]
    with accelerator.split_between_processes(prompts) as share, torch.no_grad():
        tokens = [model.generate(torch.tensor([prompt], device=accelerator.device))[0] for prompt in share]
    mine = [" ".join(map(str, one.tolist())) for one in tokens]
    print(f"process {accelerator.process_index} of {accelerator.num_processes}: {len(mine)} prompts", flush=True)
    results = accelerator.gather_for_metrics(mine)  # whatever their lengths
    if accelerator.is_main_process:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"{prompt}: {result}")


if __name__ == "__main__":
    main()
