"""Perplexity of a text longer than the model's context: windows that overlap, each token counted once.

A window of CONTEXT tokens moves on by STRIDE; only tokens that no earlier window has counted count, so all but the
first ones are judged with at least CONTEXT - STRIDE tokens before them. Processes share the windows; sums are added up.
Expected output of

    accelerator launch --nproc-per-node 2 examples/evaluate_perplexity.py

    stride 64: perplexity 19.6.. over 17.. tokens
    stride 32: perplexity 19.7.. over 17.. tokens
    stride 8: perplexity 19.7.. over 17.. tokens

with the same numbers on any number of processes. A smaller stride costs more, and gives each token more of what
comes before it.
"""

import math
from pathlib import Path

import torch
from torch import nn

from accelerator import Accelerator

CONTEXT, WIDTH = 64, 48


class LanguageModel(nn.Module):
    """Bytes, attention over what came before, and a guess at the next byte."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 256)

    def forward(self, x):
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        hidden = self.tokens(x) + self.places(torch.arange(length, device=x.device))
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def train(model, text):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    starts = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = torch.randint(len(text) - CONTEXT - 1, (16,), generator=starts)
        batch = torch.stack([text[i : i + CONTEXT + 1] for i in at])
        nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def windows(length, stride):
    """(start, end, first token that counts) of each window; token 0 is only context."""
    counted = 1
    for start in range(0, length, stride):
        end = min(start + CONTEXT + 1, length)
        yield start, end, counted
        counted = end
        if end == length:
            return


def main():
    accelerator = Accelerator(seed=0)
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long().to(accelerator.device)
    model = LanguageModel().to(accelerator.device)
    train(model, text[: len(text) // 2])  # the same on every process
    text = text[len(text) // 2 :]
    for stride in (64, 32, 8):
        total, count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        with accelerator.split_between_processes(list(windows(len(text), stride))) as share, torch.no_grad():
            for start, end, counted in share:
                logits = model(text[None, start : end - 1])[0, counted - start - 1 :]
                total += nn.functional.cross_entropy(logits, text[counted:end], reduction="sum")
                count += end - counted
        total, count = accelerator.reduce(torch.stack([total, count])).tolist()
        if accelerator.is_main_process:
            print(f"stride {stride}: perplexity {math.exp(total / count):.3f} over {count:.0f} tokens")


if __name__ == "__main__":
    main()
