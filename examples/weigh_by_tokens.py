"""Train on sequences of different lengths so that every token counts the same, in whatever batch it is.

The loss of a batch is the mean over its tokens; `backward(loss, weight=num_tokens)` says how many those are. The
gradient of a window is then the mean over all its tokens, over all batches and all processes. Without the weight every
sample counts the same, and a token in a batch of short sequences more than others. Expected output:

    48 sequences of 1 to 40 tokens, in windows of 3 batches
    largest error of a gradient, against that over all tokens of the window:
      weight=num_tokens   0.0 %
      no weight         113.7 %
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from accelerator import Accelerator

VOCABULARY, PADDING, STEPS, BATCH = 11, -100, 3, 4


def collate(sequences):
    """Sequences of tokens as inputs and targets, each (batch, longest - 1); padding is not to be predicted."""
    padded = pad_sequence(sequences, batch_first=True, padding_value=PADDING)
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


def token_mean(model, inputs, targets):
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))


def gradient(model):
    return torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])


def largest_error(weighted):
    accelerator = Accelerator(gradient_accumulation_steps=STEPS, split_batches=True, seed=0)
    sequences = [torch.randint(VOCABULARY, (length,)) for length in (2 + 40 * torch.rand(48) ** 3).int().tolist()]
    model, twin = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(sequences, batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    largest, start = 0.0, 0
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = token_mean(model, inputs, targets)
            num_tokens = (targets != PADDING).sum()
            accelerator.backward(loss, weight=num_tokens if weighted else None)
            # Clipping makes the gradients final; here it only has them ready to be looked at.
            if accelerator.clip_grad_norm_(model.parameters(), float("inf")) is not None:
                window = collate(sequences[start : start + STEPS * BATCH])
                start += STEPS * BATCH
                twin.zero_grad()
                token_mean(twin, *window).backward()
                truth = gradient(twin)
                largest = max(largest, ((gradient(model) - truth).norm() / truth.norm()).item())
            optimizer.step()
            optimizer.zero_grad()
        twin.load_state_dict(accelerator.unwrap_model(model).state_dict())
    return accelerator, largest


def main():
    accelerator, weighted = largest_error(weighted=True)
    _, unweighted = largest_error(weighted=False)
    accelerator.print("48 sequences of 1 to 40 tokens, in windows of 3 batches")
    accelerator.print("largest error of a gradient, against that over all tokens of the window:")
    accelerator.print(f"  weight=num_tokens  {100 * weighted:4.1f} %")
    accelerator.print(f"  no weight          {100 * unweighted:4.1f} %")


if __name__ == "__main__":
    main()
