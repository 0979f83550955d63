"""Training under one mode of XLA beside plain PyTorch, as a script: prints what came of every part as JSON.

`python parts.py MODE [PART ...]`. One process has one mode, and plain backward may run only after the runtime has
started, so everything of a mode is done in one process.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import EMA, Accelerator
from accelerator.checkpoint.tensors import stage
from compilations import loops
from conformance import rules
from loading import exceptions, workers
from normalising import normalising
from padding import padded
from strategies import XLA
from training import (
    BATCH,
    CONFORMING,
    LENGTH,
    MODES,
    STEPS,
    distance,
    each_loss,
    make_data,
    make_net,
    make_schedule,
    make_sgd,
    plain,
    shapes_on_devices,
    steps,
    train,
    weights_of,
)


def sgd(strategy: XLA) -> Any:
    came = train(strategy)
    return {**distance(came, plain()), **{name: came[name] for name in ("costs", "tied", "shapes", "explain")}}


def accumulation(strategy: XLA) -> Any:
    """One epoch with windows of other lengths; the last has one micro-batch, of three samples."""
    lengths = (1, 2, 4)
    return {
        steps: distance(train(strategy, num_steps=steps, epochs=1), plain(num_steps=steps, epochs=1))
        for steps in lengths
    }


def adamw(strategy: XLA) -> Any:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)

    came = train(strategy, make)
    return {**distance(came, plain(make)), "costs": came["costs"]}


def by_tokens(strategy: XLA) -> Any:
    came = train(strategy, tokens=True)
    return {**distance(came, plain(tokens=True)), "costs": came["costs"]}


def bf16(strategy: XLA) -> Any:
    return distance(train(strategy, mixed_precision="bf16"), plain())


class Blocks(nn.Module):
    """Blocks to be computed again: called by keyword, given data that needs no gradient, returning a tuple."""

    class Block(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.up, self.drop, self.down = nn.Linear(32, 64), nn.Dropout(rate), nn.Linear(64, 32)

        def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, None]:
            return x + scale * self.down(torch.tanh(self.drop(self.up(x)))), None

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(rate) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, scale=0.5)
        return x


def recomputed(strategy: XLA) -> Any:
    """Activation checkpointing changes no number: of a run or of one gradient, with dropout, nor of a copy."""
    again = replace(strategy, activation_checkpointing=True)
    runs, gradients, tanhs = [], [], []
    for chosen in (strategy, again):
        accelerator = Accelerator(chosen, gradient_accumulation_steps=STEPS, seed=1)
        net = make_net(lambda: Blocks(0.5))
        model, optimizer, loader = accelerator.prepare(net, make_sgd(net), DataLoader(make_data(), batch_size=BATCH))
        runs.append(torch.cat([each.cpu() for each in steps(accelerator, model, optimizer, loader)]))
        dropping = accelerator.prepare(make_net(lambda: Blocks(0.5)))
        torch_xla.manual_seed(7)
        each_loss(dropping, *[t[:BATCH].to(accelerator.device) for t in make_data().tensors[:2]]).mean().backward()
        recorded = [parameter.grad for parameter in dropping.parameters()]
        tanhs.append(torch_xla._XLAC._get_xla_tensors_text(recorded).count("::tanh("))
        gradients.append(torch.cat([gradient.cpu().flatten() for gradient in recorded]))
    x = make_data().tensors[0]
    copied, loaded = copy.deepcopy(model).cpu().eval(), pickle.loads(pickle.dumps(model)).cpu().eval()
    return {
        "losses": float(((runs[0] - runs[1]).abs() / runs[0]).max()),
        "gradient": float((gradients[0] - gradients[1]).abs().max()),
        "tanhs": tanhs,
        "of copies": float((copied(x) - loaded(x)).abs().max()),
        "explain": "recomputed                        2 blocks" in str(accelerator.explain()),
    }


def evaluation(strategy: XLA) -> Any:
    """An evaluation in the middle of a window, left by break; metrics gathered; programs stay small."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS)
    net = make_net()
    model, optimizer, loader, test_loader = accelerator.prepare(
        net, make_sgd(net), DataLoader(make_data(), batch_size=BATCH), DataLoader(make_data(43), batch_size=BATCH)
    )
    gathered, pending = [], []
    for number, _ in enumerate(steps(accelerator, model, optimizer, loader)):
        if number in (1, 3):
            model.eval()
            with torch.no_grad():
                for index, (inputs, targets, _) in enumerate(test_loader):
                    values = accelerator.gather_for_metrics(each_loss(model, inputs, targets))
                    pending.append(pending_ir([values]))
                    if number == 3:
                        gathered.append(values)
                    elif index == 2:
                        break
            model.train()
    weights = weights_of(model)
    came = torch.cat([values.cpu() for values in gathered])
    plainly, (x, y, _) = make_net(), make_data().tensors
    optimizer = make_sgd(plainly)
    expected = None
    for first in range(0, LENGTH, BATCH * STEPS):
        if first == BATCH * STEPS:
            with torch.no_grad():
                inputs, targets, _ = make_data(43).tensors
                expected = each_loss(plainly, inputs, targets)
        optimizer.zero_grad()
        each_loss(plainly, x[first : first + BATCH * STEPS], y[first : first + BATCH * STEPS]).mean().backward()
        optimizer.step()
    assert expected is not None
    return {
        "length": len(came),
        "metrics": float((came - expected).abs().max()),
        "weights": max(float((weights[n] - w).abs().max()) for n, w in weights_of(plainly).items()),
        "longest": max(pending[6:]),
        "first": pending[6],
    }


def pending_ir(tensors: list[Tensor]) -> int:
    """Operations recorded for these tensors and not run."""
    return torch_xla._XLAC._get_xla_tensors_text(tensors).count("\n")


def resume(strategy: XLA) -> Any:
    """State dicts after one epoch, loaded into new objects: the second epoch is the same to the last bit."""

    def run(state: Any, epochs: int) -> tuple[Any, Any]:
        accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS)
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        schedule = make_schedule(optimizer)
        model, optimizer, schedule, loader = accelerator.prepare(
            net, optimizer, schedule, DataLoader(make_data(), batch_size=BATCH)
        )
        if state is not None:
            for item, saved in zip((model, optimizer, schedule), state, strict=True):
                item.load_state_dict(saved)
        states, loaded = [], shapes_on_devices(model, optimizer)
        for _ in range(epochs):
            for _ in steps(accelerator, model, optimizer, loader, schedule):
                pass
            weights = accelerator.get_state_dict(model)
            moments = copy.deepcopy(torch.utils._pytree.tree_map_only(Tensor, on_cpu, optimizer.state_dict()))
            states.append((weights, moments, copy.deepcopy(schedule.state_dict())))
        return states, loaded, shapes_on_devices(model, optimizer)

    whole, _, before = run(None, 2)
    parts, loaded, after = run(whole[0], 1)
    differences = [float((whole[1][0][name] - value).abs().max()) for name, value in parts[0][0].items()]
    make_net().load_state_dict(whole[1][0])  # what was saved fits a model on the CPU
    return {"weights": max(differences), "same shapes": before == after, "same before a step": before == loaded}


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def dropout(strategy: XLA) -> Any:
    """Random numbers of the device, under two seeds, and around an evaluation, which runs what is recorded."""
    drawn = []
    for seed, evaluates in ((1, False), (1, True), (2, False)):
        accelerator = Accelerator(strategy, seed=seed)
        test_loader = accelerator.prepare(DataLoader(make_data(19), batch_size=BATCH))
        ones = torch.ones(64, device=accelerator.device)
        masks = [nn.functional.dropout(ones, 0.5)]
        with torch.no_grad():
            for x, *_ in test_loader if evaluates else ():
                x.sum().item()
        masks.append(nn.functional.dropout(ones, 0.5))
        drawn.append([mask.cpu().tolist() for mask in masks])
        accelerator.end_training()
    return {"same": drawn[0] == drawn[1], "other": drawn[0] != drawn[2]}


OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def optimizers(strategy: XLA) -> Any:
    """Of each optimizer of torch, how far its first step is from that on a CPU, or why it is refused."""
    found: dict[str, Any] = {}
    asked = [(name, {}) for name in (*OPTIMIZERS, "Adafactor")]
    for name, options in [*asked, ("AdamW", {"fused": True}), ("SGD", {"fused": True}), ("AdamW", {"foreach": True})]:
        label = " ".join([name, *options])
        accelerator = Accelerator(strategy)
        net, twin = make_net(), make_net()
        (x, y, _), kind = make_data(8).tensors, getattr(torch.optim, name)
        each_loss(twin, x, y).mean().backward()
        kind(twin.parameters(), lr=1e-2).step()
        try:
            model, optimizer = accelerator.prepare(net, kind(net.parameters(), lr=1e-2, **options))
        except Exception as error:
            found[label] = f"{type(error).__name__}: {error}"
            continue
        with accelerator.accumulate(model):
            accelerator.backward(each_loss(model, x.to(accelerator.device), y.to(accelerator.device)).mean())
            optimizer.step()
        weights = weights_of(model)
        found[label] = max(float((weights[n] - w).abs().max()) for n, w in weights_of(twin).items())
    return found


def clipping(strategy: XLA) -> Any:
    """Of ways to clip but by the Euclidean norm: how far a step is from that on a CPU, and values read for it."""
    found: dict[str, Any] = {}
    for name in ("value", "largest"):
        accelerator = Accelerator(strategy)
        net, twin = make_net(), make_net()
        x, y, _ = make_data(8).tensors
        model, optimizer = accelerator.prepare(net, make_sgd(net))
        with accelerator.accumulate(model):
            accelerator.backward(each_loss(model, x.to(accelerator.device), y.to(accelerator.device)).mean())
            before = num_read()
            if name == "value":
                accelerator.clip_grad_value_(model.parameters(), 1e-3)
            else:
                accelerator.clip_grad_norm_(model.parameters(), 1e-3, float("inf"))
            found[f"reads for {name}"] = num_read() - before
            optimizer.step()
        each_loss(twin, x, y).mean().backward()
        if name == "value":
            nn.utils.clip_grad_value_(twin.parameters(), 1e-3)
        else:
            nn.utils.clip_grad_norm_(list(twin.parameters()), 1e-3, float("inf"))
        make_sgd(twin).step()
        found[name] = max(float((weights_of(model)[n] - w).abs().max()) for n, w in weights_of(twin).items())
    return found


def num_read() -> int:
    return (metrics.metric_data("TransferFromDeviceTime") or [0])[0]


def num_compiled() -> int:
    """Programs compiled so far, with those that put tensors together to be read."""
    return (metrics.metric_data("CompileTime") or [0])[0]


def export(strategy: XLA) -> Any:
    """Weights go out whole and come back, prepared or plain, cut or not."""
    accelerator = Accelerator(strategy)
    net = make_net()
    net.up.weight.label = "mine"
    model, optimizer = accelerator.prepare(net, make_sgd(net))
    before = shapes_on_devices(model, optimizer)
    other = {name: value + 1 for name, value in make_net().state_dict().items()}
    model.load_state_dict(other)
    torch_xla.sync()
    before_reading = num_compiled()
    state = accelerator.get_state_dict(model)
    staged = stage(model.state_dict(), {})
    again = stage(model.state_dict(), staged)
    return {
        "equal": all(torch.equal(state[name], value) for name, value in other.items()),
        "staged": all(torch.equal(again[name], value) for name, value in other.items()),
        "in the same memory": all(again[name] is value for name, value in staged.items()),
        "nothing compiled": num_compiled() == before_reading,
        "on the CPU": all(value.device.type == "cpu" for value in state.values()),
        "cut as before": shapes_on_devices(model, optimizer) == before,
        "tied": model.again.weight is model.down.weight,
        "labelled": model.up.weight.label == "mine",
    }


def averaged(strategy: XLA) -> Any:
    """Averages of the weights after each step, laid out as they are, in the model for a while, and out of it again."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS)
    model = accelerator.prepare(make_net())
    optimizer, loader = accelerator.prepare(make_sgd(model), DataLoader(make_data(), batch_size=BATCH))
    ema, expected = EMA(accelerator, model, decay=0.8), dict[str, Tensor]()
    for _ in steps(accelerator, model, optimizer, loader):
        if accelerator.sync_gradients:
            for name, own in weights_of(model).items():
                expected[name] = torch.lerp(expected[name], own, 1 - 0.8) if name in expected else own
    own, before = weights_of(model), shapes_on_devices(model, optimizer)
    with ema.applied():
        inside = weights_of(model)
    spec = torch_xla._XLAC._get_xla_sharding_spec
    return {
        "averages": max(float((inside[name] - value).abs().max()) for name, value in expected.items()),
        "apart": any(not torch.equal(inside[name], value) for name, value in own.items()),
        "restored": all(torch.equal(weights_of(model)[name], value) for name, value in own.items()),
        "cut as before": shapes_on_devices(model, optimizer) == before,
        "cut alike": all(spec(ema._averages[name]) == spec(value) for name, value in model.named_parameters()),
    }


PARTS = (
    sgd, accumulation, adamw, by_tokens, padded, bf16, recomputed, normalising, evaluation, resume, dropout, optimizers,
    clipping, exceptions, workers, export, averaged, loops, rules,
)  # fmt: skip
# What one device shows as well as a mesh of several.
ONLY_UNDER = {
    "optimizers": ("fsdp",),
    "loops": ("none", "fsdp"),
    "recomputed": ("none", "fsdp"),
    "padded": ("none", "fsdp"),
    "averaged": ("data", "fsdp"),
    "workers": ("data",),
}


def main(mode: str, wanted: list[str]) -> None:
    results: dict[str, Any] = {}
    for part in PARTS:
        name = part.__name__
        if mode not in ONLY_UNDER.get(name, (mode,)) or (wanted and name not in wanted):
            continue
        start = time.process_time()
        try:
            results[name] = part(CONFORMING[mode] if part is rules else MODES[mode])
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        print(f"{name}: {time.process_time() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
