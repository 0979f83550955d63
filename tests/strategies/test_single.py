"""One process on one device."""

from __future__ import annotations

import pytest
import torch

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, ConfigurationError, LaunchError, SingleDevice, World


def test_the_world_of_one_process() -> None:
    assert CPU().setup() == World(device=torch.device("cpu"))


@pytest.mark.parametrize("strategy", ["cpu", "single"])
def test_each_of_several_processes_would_train_alone(ranks: RankPool, strategy: str) -> None:
    for error in ranks(construct, strategy, return_exceptions=True):
        assert isinstance(error, LaunchError)
        assert "trains in one process, but 2 were started. Use strategy='ddp'" in str(error)


def construct(strategy: str) -> None:
    Accelerator(strategy=strategy)


def test_a_job_of_one_process_is_one_process(ranks: RankPool) -> None:
    ranks(construct, "cpu", nproc=1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device is '{device}', but this machine has only the CPU"):
        Accelerator(strategy=SingleDevice(device=device))


@pytest.mark.parametrize("device", ["gpu0", "", "cuda:first"])
def test_a_device_that_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=r"device is .*; expected 'auto', 'cpu', 'cuda'"):
        Accelerator(strategy=SingleDevice(device=device))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert Accelerator(strategy="single").device == torch.device("cpu")


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")
def test_auto_is_the_accelerator_of_the_machine() -> None:
    accelerator = Accelerator(strategy="single")
    assert accelerator.device.type == torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    model = accelerator.prepare(torch.nn.Linear(2, 1))
    assert model(torch.ones(1, 2, device=accelerator.device)).device == accelerator.device
