"""A run that stops inside an accumulation window goes on inside it: exactly in the same place, rightly in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from blocks_net import Net, losses_of
from datasets_of_numbers import Sines
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, StateError

PLACES: dict[str, tuple[Any, int]] = {
    "cpu": (CPU(), 1),
    "ddp 2": (DDP(), 2),
    "ddp 2 in buckets": (DDP(gradient_as_bucket_view=True), 2),
    "ddp 4": (DDP(), 4),
    "fsdp 2": (FSDP(), 2),
    "fsdp 2 reducing": (FSDP(reduce_every_micro_batch=True, ignored_params=("head.bias",)), 2),
    "hsdp": (FSDP(replicate=2), 4),
}


def run(
    place: str,
    folder: str,
    stop: int | None,
    steps: int = 3,
    precision: Any = "no",
    weights: str = "samples",
    batch: int = 4,
    dropout: float = 0.3,
) -> Any:
    """Train two models of one class in windows of their own over two loaders, up to micro-batch `stop`; then save."""
    accelerator = Accelerator(
        PLACES[place][0],
        gradient_accumulation_steps=steps,
        mixed_precision=precision,
        project_dir=folder,
        seed=1,
        split_batches=True,
    )
    first, second = Net(), Net(width=4)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-3) for net in (first, second)]
    loaders = [torch.utils.data.DataLoader(Sines(length, 5), batch, shuffle=True) for length in (18, 19)]
    *models, one, two, left, right = accelerator.prepare(first, second, *optimizers, *loaders)
    accelerator.resume()
    drop = nn.Dropout(dropout)
    done = left.state_dict()["position"] // batch + left.state_dict()["epoch"] * (-(-18 // batch))
    losses = []
    while left.state_dict()["epoch"] < 2:
        for x, z in zip(left, right, strict=False):
            for model, optimizer, data, source in ((models[0], one, x, left), (models[1], two, z, right)):
                with accelerator.accumulate(model, loader=source):
                    loss = losses_of(model(drop(data)).float(), torch.ones(len(data))).mean() / 64
                    weight = {"samples": None, "count": len(data), "varied": 1.0 + float(data[0, 0])}[weights]
                    accelerator.backward(loss, weight=weight)
                    accelerator.clip_grad_norm_(model.parameters(), 0.02)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
            done += 1
            if done == stop:
                return losses, None, accelerator.save_state(Path(folder) / "checkpoints" / f"step-{done:09d}")
    return losses, [accelerator.get_state_dict(model) for model in models], None


def on(ranks: RankPool, place: str, *arguments: Any) -> Any:
    return ranks(run, place, *arguments, nproc=PLACES[place][1])[0]


def assert_same(one: Any, two: Any, tolerance: float | None = None) -> None:
    for weights, expected in zip(one, two, strict=True):
        for name, value in expected.items():
            if tolerance is None:
                assert torch.equal(weights[name], value), name
            else:
                torch.testing.assert_close(weights[name], value, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize(
    ("place", "steps", "precision", "weights"),
    [
        ("cpu", 1, "fp16", "varied"),
        ("ddp 2", 3, "fp16", "samples"),
        ("ddp 2 in buckets", 8, "no", "varied"),
        ("ddp 4", 2, "no", "samples"),
        ("fsdp 2", 5, "fp16", "varied"),
        ("fsdp 2 reducing", 3, "no", "samples"),
        ("hsdp", 4, "bf16", "samples"),
    ],
)
def test_in_the_same_place_it_is_exact(
    ranks: RankPool, tmp_path: Path, place: str, steps: int, precision: str, weights: str
) -> None:
    losses, whole, _ = on(ranks, place, str(tmp_path / "whole"), None, steps, precision, weights)
    parts: list[float] = []
    for stop in (2, 6, None):
        more, last, _ = on(ranks, place, str(tmp_path / "parts"), stop, steps, precision, weights)
        parts += more
    assert parts == losses
    assert_same(last, whole)


@pytest.mark.parametrize(
    ("weights", "order"),
    [
        ("samples", ["cpu", "ddp 2", "fsdp 2 reducing", "hsdp", "fsdp 2", "ddp 4", "cpu"]),
        ("count", ["ddp 2", "cpu", "fsdp 2"]),
    ],
)
def test_in_another_place_it_is_the_same_training(
    ranks: RankPool, tmp_path: Path, weights: str, order: list[str]
) -> None:
    options = (4, "no", weights, 4, 0.0)
    _, whole, _ = on(ranks, "cpu", str(tmp_path / "whole"), None, *options)
    stops = (1, 2, 3, 6, 7, 9)[: len(order) - 1]
    for place, stop in zip(order, (*stops, None), strict=True):
        _, last, _ = on(ranks, place, str(tmp_path / "parts"), stop, *options)
    assert_same(last, whole, 1e-6)


def first_window(folder: Path, batch: int, steps: int) -> tuple[torch.Tensor, int]:
    """Go on to the end of the first window; the weights then, and the samples of its last part."""
    accelerator = Accelerator(CPU(), gradient_accumulation_steps=steps, project_dir=folder, seed=1)
    net = Net()
    loader = torch.utils.data.DataLoader(Sines(60, 5), batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
    begun = accelerator.resume() is not None
    samples = 0
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(losses_of(model(x), torch.ones(len(x))).mean())
            optimizer.step()
            optimizer.zero_grad()
        samples += len(x)
        if not begun and samples == 12:
            accelerator.save_state()
        if accelerator.sync_gradients:
            break
    return net.first.weight.detach().clone(), samples


@pytest.mark.parametrize(("batch", "taken"), [(8, 8), (2, 8), (3, 9)])
def test_with_another_batch_size_the_window_is_filled_up(tmp_path: Path, batch: int, taken: int) -> None:
    """Twelve of its twenty samples were taken. With batches of three it takes one more, and is the mean over 21."""
    whole, _ = first_window(tmp_path, 4, 5)
    weight, samples = first_window(tmp_path, batch, 5)
    assert samples == taken
    if taken == 8:
        torch.testing.assert_close(weight, whole, atol=1e-7, rtol=1e-6)
    else:
        with_21, _ = first_window(tmp_path / "21", 7, 3)
        torch.testing.assert_close(weight, with_21, atol=1e-7, rtol=1e-6)


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    run("cpu", str(tmp_path), 1, 3, "fp16")
    with pytest.raises(StateError, match="inside an open accumulation window in mixed_precision='fp16'"):
        run("cpu", str(tmp_path), None, 3, "no")


def test_inside_a_micro_batch_it_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), gradient_accumulation_steps=2, project_dir=tmp_path)
    net = nn.Linear(4, 3)
    model, _ = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    with accelerator.accumulate(model), pytest.raises(StateError, match="Save after the block"):
        accelerator.save_state()


def test_loading_inside_an_open_window_drops_what_it_had_summed(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), gradient_accumulation_steps=2, project_dir=tmp_path)
    net = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))

    def micro_batch(value: float) -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((2, 4), value)).sum())
            optimizer.step()
            optimizer.zero_grad()

    micro_batch(1.0)
    saved = accelerator.save_state()
    micro_batch(2.0)
    expected = net.weight.clone()
    micro_batch(100.0)
    accelerator.load_state(saved)
    assert not accelerator.sync_gradients
    micro_batch(2.0)
    assert accelerator.sync_gradients
    assert torch.equal(net.weight, expected)
