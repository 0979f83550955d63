"""Training around, inside and on top of models whose weights rest on the disk equals training in memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from accelerator.bigmodel import disk_offload, init_empty_weights, load_checkpoint_and_dispatch, remove_dispatch
from blocks_net import Net, make_net
from offloaded_net import Adapted, check_equal, offloaded, train
from rank_pool import RankPool
from strategies.errors import PrepareError, StepError


def test_adapters_over_weights_on_the_disk(net: Path) -> None:
    assert all(map(torch.equal, train(Adapted(offloaded(net, offload_budget=1500))), train(Adapted(make_net()))))


@pytest.mark.usefixtures("by_copies")
def test_adapters_over_copies_that_backward_fetches_again(net: Path) -> None:
    with init_empty_weights():
        base = Net()
    base.requires_grad_(False)
    load_checkpoint_and_dispatch(base, net, {"": "disk"}, offload_budget=1500)
    assert all(map(torch.equal, train(Adapted(base)), train(Adapted(make_net()))))
    assert all(part.num_bytes <= 1500 for part in base._dispatched.residency._holdings)  # type: ignore[union-attr]


class Lora(nn.Module):
    """A frozen layer with something trainable beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, 1, bias=False), nn.Linear(1, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


def train_lora(folder: Path | None, *, before: bool = True) -> list[Tensor]:
    model = make_net(seed=5).requires_grad_(False)
    if folder is not None and not before:
        disk_offload(model, folder, offload_budget=1500)
    torch.manual_seed(7)
    for layer in model.layers:
        layer.up, layer.down = Lora(layer.up), Lora(layer.down)
    if folder is not None and before:
        disk_offload(model, folder, offload_budget=1500)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for seed in range(4):
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*trained, *model.parameters()]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_adapters_inside_blocks_on_the_disk(
    tmp_path: Path, before: bool, copies: bool, request: pytest.FixtureRequest
) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    expected = train_lora(None)
    assert all(map(torch.equal, train_lora(tmp_path, before=before), expected))
    assert not list(tmp_path.glob("*.[ab].weight*"))


@pytest.mark.usefixtures("by_copies")
def test_copies_are_not_trained(net: Path) -> None:
    model = offloaded(net)
    with pytest.raises(StepError, match=r"rest on another device.*torch.no_grad\(\), or freeze them"):
        model(torch.ones(2, 5))
    check_equal(model, make_net())  # the failure left nothing behind


def test_all_of_a_model_on_the_disk_can_be_trained(net: Path) -> None:
    model, expected = offloaded(net, offload_budget=1500), make_net()
    for one in (model, expected):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            one(torch.ones(2, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    check_equal(model, expected)


# -- prepare -----------------------------------------------------------------------------------------------


def test_a_dispatched_model_is_not_prepared(net: Path) -> None:
    model = offloaded(net)
    with pytest.raises(PrepareError, match=r"Net is dispatched: .* strategy='fsdp'"):
        Accelerator("cpu").prepare(model)
    Accelerator("cpu").prepare(remove_dispatch(model))


def prepare_around_and_within(folder: str, strategy: str) -> list[str]:
    """What `prepare` says of a model with a dispatched one inside it, and of a module of a dispatched one."""
    accelerator = Accelerator(strategy)
    base = offloaded(Path(folder))
    said = []
    for model in (Adapted(base), base.layers[1], base.layers):
        try:
            accelerator.prepare(model)
            said.append("accepted")
        except PrepareError as error:
            said.append(str(error))
    return said


def test_nor_is_one_inside_another_nor_a_module_of_it(net: Path, ranks: RankPool) -> None:
    for around, within, several in ranks(prepare_around_and_within, str(net), "ddp", nproc=2):
        assert re.match(r"Adapted holds modules of a dispatched model \(base, .*Prepare only what is trained", around)
        assert within.startswith("Block holds modules of a dispatched model")
        assert several.startswith("ModuleList holds modules of a dispatched model (0, 1, 2)")


def train_prepared(folder: str | None, strategy: str) -> tuple[list[float], Tensor]:
    """Train a head on what a model gives, which rests on the disk or is in memory."""
    accelerator = Accelerator(strategy)
    base = (offloaded(Path(folder), offload_budget=1500) if folder else make_net()).requires_grad_(False)
    torch.manual_seed(7)
    head = nn.Linear(4, 1)
    head, optimizer = accelerator.prepare(head, torch.optim.SGD(head.parameters(), lr=0.1))
    losses = []
    for seed in range(4):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed + 10 * accelerator.process_index))
        loss = head(base(x)[None]).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, head.weight.detach().clone()


def test_what_is_trained_on_a_dispatched_model_is_prepared(net: Path, ranks: RankPool) -> None:
    of_disk, of_memory = (ranks(train_prepared, folder, "ddp", nproc=2) for folder in (str(net), None))
    for (losses, weight), (expected_losses, expected) in zip(of_disk, of_memory, strict=True):
        assert losses == expected_losses
        assert torch.equal(weight, expected)
    assert torch.equal(of_disk[0][1], of_disk[1][1])


def test_one_process_on_a_cpu_trains_around_a_dispatched_model(net: Path) -> None:
    model = Adapted(offloaded(net, offload_budget=1500))
    assert prepare_around_and_within(str(net), "cpu") == ["accepted"] * 3
    assert all(map(torch.equal, train(Accelerator("cpu").prepare(model)), train(Adapted(make_net()))))
