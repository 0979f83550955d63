"""FSDP on a GPU with one rank over NCCL, against plain PyTorch on the CPU. Not run by `make test`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accelerator import Accelerator
from blocks_net import Net, assert_equal, make_net, train, train_plain
from strategies import FSDP
from strategies.shards import local, whole

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: gloo on a CPU is in tests/strategies"
)
SETTINGS = {
    "default": FSDP(),
    "reshard": FSDP(reshard_after_forward=True),
    "keep": FSDP(reshard_after_forward=False),
    "one block": FSDP(auto_wrap_policy="none"),
    "reduce_every_micro_batch": FSDP(reduce_every_micro_batch=True),
    "cpu_offload": FSDP(cpu_offload=True),
    "checkpointing": FSDP(activation_checkpointing=True),
    "prefetch": FSDP(forward_prefetch=2, backward_prefetch=2),
    "no prefetch": FSDP(backward_prefetch=0),
    "compile": FSDP(compile=True),
    "ignored": FSDP(ignored_params=("head.*", "scale")),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Matrix products in all 23 bits: TF32 has 10."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_every_setting_gives_the_numbers_of_plain_pytorch(setting: str) -> None:
    assert_equal(train(SETTINGS[setting], 0.5)[:3], train_plain(1, clip=0.5), tolerance=1e-5)


@pytest.mark.parametrize("setting", ["default", "cpu_offload", "checkpointing"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_low_precision_stays_near_float32(setting: str, precision: str, tolerance: float) -> None:
    got = train(SETTINGS[setting], clip=0.5 / 64, precision=precision, unit=1 / 64)
    assert_equal(got[:3], train_plain(1, clip=0.5 / 64, unit=1 / 64), tolerance)
    assert all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in got[2].values())


def prepared(strategy: FSDP) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(strategy)
    model, optimizer = accelerator.prepare(net := make_net(), torch.optim.AdamW(net.parameters(), fused=True))
    return accelerator, model, optimizer


@pytest.mark.parametrize("offload", [False, True])
def test_parts_are_where_they_belong(offload: bool) -> None:
    accelerator, model, optimizer = prepared(FSDP(cpu_offload=offload))
    assert "cuda:nccl" in dist.get_backend_config()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 5, device=accelerator.device)).square().mean())
            assert float(accelerator.clip_grad_norm_(model.parameters(), 1.0)) > 0
            optimizer.step()
            optimizer.zero_grad()
        model.to(local(next(model.parameters())).device)  # changes nothing
    for name, parameter in model.named_parameters():
        if name != "scale":  # a scalar stays whole, on the device
            assert local(parameter).device.type == ("cpu" if offload else "cuda")
            assert not offload or local(parameter).is_pinned()
    accelerator.end_training()


def test_a_model_is_born_as_on_the_device() -> None:
    torch.manual_seed(3)
    with torch.device("cuda"):
        plain = Net()
    accelerator = Accelerator(FSDP())
    torch.manual_seed(3)
    with accelerator.init_module():
        net = Net()
    model = accelerator.prepare(net)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(parameter), other), name
    accelerator.end_training()
