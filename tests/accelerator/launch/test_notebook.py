"""`notebook_launcher`, called from a real Jupyter kernel, and what it refuses before anything is started."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import BlockingKernelClient, KernelManager

import accelerator.config
from accelerator import notebook_launcher
from fresh_process import FreshProcesses
from rank_pool import without_launch_variables
from strategies import ConfigurationError, LaunchError

ROOT = Path(accelerator.config.__file__).parents[2]


@dataclass
class Ran:
    """A cell that ran: what it showed, and its error with the traceback, empty if it had none."""

    shown: str = ""
    error: str = ""


class Notebook:
    """A kernel, and cells that are run in it."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self._client = manager, client

    def __call__(self, cell: str, *, interrupt_at: str | None = None) -> Ran:
        """Run a cell to its end; interrupt the kernel, as its stop button does, when it shows `interrupt_at`."""
        ran = Ran()

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            ran.shown += content.get("text", "") or content.get("data", {}).get("text/plain", "")
            if message["msg_type"] == "error":
                ran.error = "\n".join([f"{content['ename']}: {content['evalue']}", *content["traceback"]])
            if interrupt_at is not None and interrupt_at in ran.shown and not interrupted.is_set():
                interrupted.set()
                self.manager.interrupt_kernel()

        interrupted = threading.Event()
        self._client.execute_interactive(cell, timeout=110, output_hook=hear)
        return ran


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("notebook")
    manager = KernelManager(transport="ipc", connection_file=str(folder / "kernel.json"), ip=str(folder / "kernel"))
    environ = without_launch_variables(dict(os.environ)) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    manager.start_kernel(cwd=str(folder), env=environ)
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(60)
    yield Notebook(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


DEFINE = """
import torch
from accelerator import Accelerator, notebook_launcher

STEPS = 3

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)

def batches():
    return torch.arange(32.0).reshape(8, 4) / 32

def train(rate):
    accelerator = Accelerator(seed=0, split_batches=True)
    model = make()
    loader = torch.utils.data.DataLoader(batches(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), rate), loader)
    for _ in range(STEPS):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
    print(f"rank {accelerator.process_index} of {accelerator.num_processes} trained")
    return [parameter.detach().clone() for parameter in accelerator.unwrap_model(model).parameters()]

def oracle(rate):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(STEPS):
        model(batches()).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())

oracle(0.1)  # threads and autograd are in use here before any process is started
"""


def test_a_function_of_the_notebook_trains_on_two_ranks(notebook: Notebook) -> None:
    assert notebook(DEFINE).error == ""
    ran = notebook("weights = notebook_launcher(train, (0.1,), num_processes=2, strategy='ddp')")
    assert ran.error == ""
    assert "rank 0 of 2 trained\n" in ran.shown
    assert "rank 1 of 2 trained\n" in ran.shown
    close = "[torch.allclose(a, b, atol=1e-6) for rank in weights for a, b in zip(rank, oracle(0.1))]"
    assert notebook(close).shown == "[True, True, True, True]"


FAIL = """
def fail():
    accelerator = Accelerator(strategy="ddp")
    if accelerator.process_index == 1:
        ones = torch.ones(3)
        ones @ torch.ones(4)  # the fault
    accelerator.wait_for_everyone()

notebook_launcher(fail, num_processes=2)
"""


def test_tracebacks_of_all_ranks_with_the_lines_of_the_cell(notebook: Notebook) -> None:
    notebook(DEFINE)
    error = notebook(FAIL).error
    assert error.startswith(
        "LaunchError: the processes of notebook_launcher failed (exit code 1).\n\nrank 1 failed:\nTr"
    )
    assert "    ones @ torch.ones(4)  # the fault\n" in error
    assert "RuntimeError: " in error
    assert "rank 0 lost a peer:\nTraceback" in error or "rank 0 was ended by the launcher here:\n" in error
    assert "wait_for_everyone" in error
    assert notebook("1 + 1").shown == "2"


WAIT = """
import os, time

def wait():
    print("pid", os.getpid(), flush=True)
    time.sleep(600)

notebook_launcher(wait, num_processes=1)
"""


def test_an_interrupt_ends_the_processes_and_leaves_the_kernel(notebook: Notebook) -> None:
    notebook(DEFINE)
    ran = notebook(WAIT, interrupt_at="\n")
    assert ran.error.startswith("KeyboardInterrupt")
    pid = int(ran.shown.split("pid ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert notebook("torch.ones(2).sum().item()").shown == "2.0"


# --- refused before anything is started --------------------------------------------------------------------------


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    def train() -> None:
        lock.acquire()

    with pytest.raises(LaunchError, match=r"train cannot be sent to other processes.*lock.*Create it inside"):
        notebook_launcher(train, num_processes=2)


def test_wrong_calls() -> None:
    with pytest.raises(LaunchError, match=r"expected a function and a tuple of its arguments"):
        notebook_launcher(print, "one", num_processes=2)  # a text is no tuple of arguments
    with pytest.raises(LaunchError, match=r"nproc_per_nod is not a setting .* Did you mean 'nproc_per_node'"):
        notebook_launcher(print, nproc_per_nod=2)
    with pytest.raises(ConfigurationError, match=r"mixed_precision is 'bf61' \(--mixed-precision\)"):
        notebook_launcher(print, num_processes=2, mixed_precision="bf61")


HELD = """
import torch_xla
torch_xla.device()
from accelerator import notebook_launcher
notebook_launcher(print, num_processes=1)
"""


def test_a_device_that_this_process_holds(fresh: FreshProcesses) -> None:
    pytest.importorskip("torch_xla", reason="the runtime that holds its devices is torch_xla's, which is not installed")
    (run,) = fresh(HELD, env={"PJRT_DEVICE": "CPU"})
    assert "LaunchError: torch_xla has started its runtime in this kernel" in run.stderr
