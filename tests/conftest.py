"""Fixtures every test may use: `ranks` and `fresh`, and a clean environment around each test."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fresh_process import FreshProcesses
from rank_pool import RankPool, without_launch_variables

POOL = pytest.StashKey[RankPool]()

# How long a case takes says nothing on a machine that is shared. A check of a change must say the same twice; new
# cases are looked for wherever the tests run otherwise.
hypothesis.settings.register_profile("anywhere", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("anywhere")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import torch while other tests run, and leave what is here by then out of collections."""
    used = any("ranks" in getattr(item, "fixturenames", ()) for item in session.items)
    if used and not session.config.option.collectonly:
        session.config.stash[POOL] = RankPool()
        session.config.stash[POOL].warm()
        # Every Accelerator collects garbage at its end; torch's million objects need no visit each time.
        importlib.import_module("torch._dynamo")  # as the first optimizer does
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Call a module-level function on several ranks at once: `ranks(fn, *args, nproc=2) -> [result of each rank]`.

    The processes are kept for the whole session; see `RankPool.__call__`. For what must not share a process
    with other tests, use `fresh`.
    """
    pool = request.config.stash.get(POOL, None) or RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Run a script in processes of its own: `fresh(text_or_path, *args, nproc=2) -> [Finished of each rank]`."""
    processes = FreshProcesses(tmp_path_factory.mktemp("fresh"))
    yield processes
    processes.kill_leftovers()


# Neither `monkeypatch` nor any other fixture of function scope: hypothesis refuses those.
@pytest.fixture(autouse=True)
def clean_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """No launch variables before a test; environment, generators and default dtype as they were after it."""
    before, generator = dict(os.environ), torch.get_rng_state()
    os.environ.clear()
    os.environ.update(without_launch_variables(before))
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_rng_state(generator)
    torch.set_default_dtype(torch.float32)
    if "fresh" in request.fixturenames:
        request.getfixturevalue("fresh").kill_leftovers()
