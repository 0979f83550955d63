"""A resumed run says whether its first step is the one that followed the checkpoint, or how it differs."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.checkpoint.comparison import MicroBatch, Step, compare
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, ConfigurationError, StateError


class Numbers(torch.utils.data.Dataset[Any]):
    """Inputs of sine; `shift` makes another dataset of the same class and length."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return {"x": (torch.arange(4) + index + self.shift).sin(), "name": f"sample {index}"}


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def run(
    strategy: Any,
    folder: str,
    *,
    save_at: int = 2,
    stop_at: int = 4,
    steps: int = 1,
    shift: float = 0.0,
    scale: float = 1.0,
    dropout: float = 0.0,
    async_: bool = False,
    on_drift: Any = "warn",
    **options: Any,
) -> list[str]:
    """Micro-batches up to `stop_at`, with a checkpoint after `save_at`; what was said of the resume."""
    accelerator = Accelerator(
        strategy, project_dir=folder, seed=0, split_batches=True, gradient_accumulation_steps=steps, **options
    )
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Numbers(shift), batch_size=4, shuffle=True)
    evaluation = torch.utils.data.DataLoader(Numbers(0.5), batch_size=16)
    model, optimizer, loader, evaluation = accelerator.prepare(net, optimizer, loader, evaluation)
    heard = Heard()
    logger = logging.getLogger("accelerator")
    before = logger.level
    logger.setLevel(logging.INFO)  # which also forgets what was not logged before
    logger.addHandler(heard)
    try:
        found = accelerator.resume(on_drift=on_drift)
        first = 0 if found is None else save_at
        for number, batch in enumerate(loader, first + 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch["x"]).square().mean() * scale)
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():  # evaluation, which is not compared
                list(evaluation)
            if number == save_at and found is None:
                accelerator.save_state(async_=async_)
            if number == stop_at:
                break
        accelerator.end_training()
    finally:
        logger.removeHandler(heard)
        logger.setLevel(before)
    return [line for line in heard.lines if "first step" in line]


def call(strategy: Any, folder: str, options: dict[str, Any]) -> list[str]:
    return run(strategy, folder, **options)


def certificate_of(folder: Path) -> Path:
    (found,) = (folder / "checkpoints").glob("step-*")
    return found / "certificate.json"


EXACT = "exact (compared: data, losses, gradient norm)"


@pytest.mark.parametrize(("strategy", "nproc"), [(CPU(), 1), (DDP(), 2), (FSDP(), 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.5}, {"steps": 2, "save_at": 1, "async_": True}, {"mixed_precision": "fp16"}],
    ids=["dropout", "inside a window", "fp16"],
)
def test_going_on_in_the_same_place_is_said_to_be_exact(
    ranks: RankPool, tmp_path: Path, strategy: Any, nproc: int, options: dict[str, Any]
) -> None:
    ranks(call, strategy, str(tmp_path), options, nproc=nproc)
    body = json.loads(certificate_of(tmp_path).read_text())
    assert [len(of_rank) for of_rank in body["ranks"]] == [1] * nproc
    said = ranks(call, strategy, str(tmp_path), {**options, "on_drift": "error"}, nproc=nproc)
    assert [EXACT in line for line in said[0]] == [True], said
    assert said[1:] == [[]] * (nproc - 1)  # rank 0 speaks


def test_wrong_data_and_drift_are_reported_or_raised(ranks: RankPool, tmp_path: Path) -> None:
    ranks(call, DDP(), str(tmp_path), {}, nproc=2)
    for options, expected in (
        ({"shift": 1.0}, "wrong data: the batch after position 8 of epoch 0 has other contents"),
        ({"scale": 1.001}, "drifted: 1.0e-03 apart, relative (compared: data, losses, gradient norm)"),
    ):
        (line,) = ranks(call, DDP(), str(tmp_path), options, nproc=2)[0]
        assert line.startswith("WARNING the first step after step-000000002: " + expected)
        raised = ranks(call, DDP(), str(tmp_path), {**options, "on_drift": "error"}, nproc=2, return_exceptions=True)
        assert all(isinstance(error, StateError) and expected in str(error) for error in raised), raised


def test_in_another_place_what_can_be_compared_is(ranks: RankPool, tmp_path: Path) -> None:
    ranks(call, DDP(), str(tmp_path), {}, nproc=2)
    for options, expected in (
        ({"on_drift": "error"}, ("INFO", "the same up to rounding", EXACT)),
        ({"shift": 1.0}, ("WARNING", "wrong data")),
        ({"scale": 1.001}, ("WARNING", "drifted")),
        ({"steps": 2, "stop_at": 4}, ("WARNING", "not comparable: 8 samples instead of 4")),
    ):
        for strategy, nproc in ((CPU(), 1), (FSDP(), 4)):
            (line,) = ranks(call, strategy, str(tmp_path), options, nproc=nproc)[0]
            assert line.startswith(expected[0])
            assert any(text in line for text in expected[1:]), line
    inside = tmp_path / "inside"
    ranks(call, CPU(), str(inside), {"steps": 2, "save_at": 1}, nproc=1)
    (line,) = ranks(call, DDP(), str(inside), {"steps": 2, "save_at": 1}, nproc=2)[0]
    assert "not comparable: saved inside an open window" in line


def test_a_certificate_is_whole_or_absent_and_the_checkpoint_is_whole_without(tmp_path: Path) -> None:
    run(CPU(), str(tmp_path), stop_at=2)
    assert not certificate_of(tmp_path).exists()
    (line,) = run(CPU(), str(tmp_path), on_drift="error")
    assert line.startswith("WARNING the first step is not compared: step-000000002 has no certificate")
    whole = tmp_path / "whole"
    run(CPU(), str(whole))
    path = certificate_of(whole)
    text = path.read_text()
    for damaged in (text[:-20], text.replace('"epoch": 0', '"epoch": 1'), "[]", "{}", '{"digest": 3, "of": []}'):
        path.write_text(damaged)
        (line,) = run(CPU(), str(whole))
        assert line.startswith("WARNING the first step is not compared: ")
        assert "certificate.json" in line
    path.write_text(text)
    assert EXACT in run(CPU(), str(whole))[0]


def test_a_save_inside_every_window_certifies_all(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path, gradient_accumulation_steps=3)
    net = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    folders = []
    for number in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 2) * number).sum())
            optimizer.step()
            optimizer.zero_grad()
        folders.append(accelerator.save_state(tmp_path / f"after-{number}", async_=number % 2 == 0))
    accelerator.end_training()
    for number, folder in enumerate(folders[:5]):
        body = json.loads((folder / "certificate.json").read_text())
        assert len(body["ranks"][0]) == 3 - (number + 1) % 3
        assert body["inside_window"] == (number % 3 != 2)
    assert not (folders[5] / "certificate.json").exists()


def test_an_exception_inside_the_step_leaves_no_certificate(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    net = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    folder = accelerator.save_state()
    with contextlib.suppress(KeyError), accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 2)).sum())
        raise KeyError("lost")
    accelerator.backward(model(torch.ones(2, 2)).sum())
    optimizer.step()
    assert not (folder / "certificate.json").exists()


def test_a_mode_that_there_is_not(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="on_drift is 'raise'; expected one of 'warn', 'error'"):
        accelerator.resume(on_drift="raise")  # type: ignore[arg-type]


def test_sparse_gradients_have_a_norm(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    net = nn.EmbeddingBag(4, 2, sparse=True)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    folder = accelerator.save_state()
    accelerator.backward(model(torch.tensor([[1, 2, 1]])).sum())
    optimizer.step()
    norm = json.loads((folder / "certificate.json").read_text())["gradient_norm"]
    assert norm == pytest.approx((2 * (2 / 3) ** 2 + 2 * (1 / 3) ** 2) ** 0.5)


def certified_batch(folder: Path, batch: dict[str, Any]) -> dict[str, Any]:
    """What the certificate of a checkpoint says of the batch that was trained on next."""
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = nn.Linear(2, 1)
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=2, collate_fn=lambda samples: batch)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
    saved = accelerator.save_state()
    for given in loader:
        accelerator.backward(model(given["x"]).sum())
        optimizer.step()
        break
    certificate = json.loads((saved / "certificate.json").read_text())
    return dict(certificate["ranks"][0][0]["batch"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_batches_of_any_tensors_are_read_or_left_out(tmp_path: Path) -> None:
    x = torch.ones(2, 2)
    odd = {
        "conjugate": (x * 1j).conj(),
        "negative": (x * 1j).conj().imag,
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
    }
    odd["nested"] = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    assert certified_batch(tmp_path, {"x": x, **odd})["samples"] == 2


def test_another_mesh_is_another_place(ranks: RankPool, tmp_path: Path) -> None:
    ranks(call, FSDP(), str(tmp_path), {}, nproc=4)
    (line,) = ranks(call, FSDP(replicate=2), str(tmp_path), {"on_drift": "error"}, nproc=4)[0]
    assert line.startswith("INFO")


def test_a_first_step_that_raises_is_said_to_be_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(CPU(), str(tmp_path))
    accelerator = Accelerator(CPU(), project_dir=tmp_path, seed=0, split_batches=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Tanh(), nn.Linear(8, 1))
    loaders = [torch.utils.data.DataLoader(Numbers(shift), batch_size=4, shuffle=shift == 0) for shift in (0, 0.5)]
    model, *_ = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01), *loaders)
    accelerator.resume(on_drift="error")
    with contextlib.suppress(KeyError), accelerator.accumulate(model):
        raise KeyError("lost")
    assert "the first step after step-000000002 is not compared: it raised KeyError('lost')" in caplog.text


def test_losses_that_cancel_are_compared_by_their_own_size() -> None:
    one, two = (
        Step([[MicroBatch(None, 1.0, 1.0), MicroBatch(None, -1.0 - rounding, 1.0)]], None, False)
        for rounding in (1.0e-7, 1.2e-7)
    )
    assert compare(one, two, same_place=False, tolerance=1e-5).kind == "rounding"


def test_arrays_are_read_too(tmp_path: Path) -> None:
    batches = [{"x": torch.ones(2, 2), "array": np.full(2, number)} for number in range(2)]
    one, two = (certified_batch(tmp_path / str(number), batch)["digest"] for number, batch in enumerate(batches))
    assert one != two


def test_without_an_optimizer_no_step_is_waited_for(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    model = accelerator.prepare(nn.Linear(2, 1))
    accelerator.save_state()
    for _ in range(3):
        accelerator.backward(model(torch.ones(1, 2)).sum())
    certificates = accelerator._checkpoints._certificates
    assert not certificates._noted
    accelerator.end_training()
