"""Each mode of torch_xla in one process of its own, which does all that is asked of the mode; two at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fresh_process import FreshProcesses

HERE = Path(__file__).resolve().parent
Came = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of `fsdp` are dumped."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def came(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Came]:
    """`came("data", "sgd")` is what came of a part of `parts.py` under a mode.

    Only the modes that tests of this session have as a parameter `mode` are run, each with all its parts.
    """
    processes = FreshProcesses(tmp_path_factory.mktemp("modes"))  # not `fresh`, whose processes end with each test
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    modes = dict.fromkeys(call["mode"] for call in calls if "mode" in call)

    def run(mode: str) -> Any:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={programs} --xla_dump_hlo_as_text"
        job = processes.start(HERE / "parts.py", mode, env={"XLA_FLAGS": flags} if mode == "fsdp" else None)
        (finished,) = job.wait(timeout=1200)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    pool = ThreadPoolExecutor(max_workers=2)
    running = {mode: pool.submit(run, mode) for mode in modes}

    def result(mode: str, part: str) -> Any:
        found = running[mode].result()[part]
        assert not isinstance(found, dict) or "error" not in found, found["error"]
        return found

    yield result
    pool.shutdown(wait=False, cancel_futures=True)
    processes.kill_leftovers()
