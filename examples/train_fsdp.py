"""Train a small GPT, its parameters cut over processes, on the text of Python's own documentation.

`init_module` builds the model without memory; `prepare` makes on each process only its part, with the numbers of one
process. The loop is that of any strategy. Expected output of

    accelerator launch --nproc-per-node 2 --strategy fsdp examples/train_fsdp.py

    4 x Block of 49,984 + the rest of GPT of 16,512 parameters; 108,224 of 216,448 on each rank
    step  20  loss 2.83
    step  40  loss 2.77
    ...
    step 120  loss 2.51
"""

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

WIDTH, HEADS, DEPTH, LENGTH, STEPS = 64, 4, 4, 64, 120


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, mask):
        seen = self.norm(x)
        x = x + self.attention(seen, seen, seen, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    def __init__(self, num_tokens):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(num_tokens, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_tokens, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def text():
    """The documentation in pieces of `LENGTH + 1` bytes, and the number of different ones."""
    data = torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode("latin-1", "replace")))
    letters, tokens = data.unique(return_inverse=True)
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1), len(letters)


def main():
    accelerator = Accelerator(seed=0, split_batches=True)
    pieces, num_tokens = text()
    with accelerator.init_module():
        model = GPT(num_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(pieces), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.print(*(row.got for row in accelerator.explain().rows if row.name == "model 0 blocks"))
    for step, (tokens,) in zip(range(1, STEPS + 1), loader, strict=False):
        with accelerator.accumulate(model):
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss = accelerator.reduce(loss.detach(), "mean")
        if step % 20 == 0:
            accelerator.print(f"step {step:3}  loss {loss:.2f}")


if __name__ == "__main__":
    main()
