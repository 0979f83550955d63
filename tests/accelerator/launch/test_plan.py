"""The plan: what would be started on a machine of a given size, and what cannot be."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from accelerator.config import resolve_settings
from accelerator.launch.flags import parse
from accelerator.launch.plan import Plan, make_plan
from strategies.errors import LaunchError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "t.py").touch()
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").touch()
    return tmp_path


def plan(folder: Path, *words: str, cores: int = 8, devices: int = 0, environ: dict[str, str] | None = None) -> Plan:
    request = parse(words)
    flags = {"ACCELERATOR_LAUNCH_FLAGS": json.dumps(dict(request.flags))}
    resolved = resolve_settings({}, environ=(environ or {}) | flags, directory=folder)
    return make_plan(
        request, resolved, environ=environ or {}, directory=folder, cores=cores, count_devices=lambda: devices
    )


def test_processes_are_what_was_asked_else_one_per_device_else_one(folder: Path) -> None:
    assert plan(folder, "--nproc-per-node", "3", "t.py", devices=2).nproc_per_node == 3
    assert plan(folder, "t.py", devices=2).nproc_per_node == 2
    assert plan(folder, "t.py", devices=0).nproc_per_node == 1
    assert plan(folder, "--strategy", "xla", "t.py", devices=2).nproc_per_node == 1
    assert plan(folder, "--strategy", "module:Class", "t.py", devices=2).nproc_per_node == 2


@pytest.mark.parametrize(("cores", "nproc", "threads"), [(8, 2, "4"), (7, 2, "3"), (2, 4, "1")])
def test_cores_are_shared_out(folder: Path, cores: int, nproc: int, threads: str) -> None:
    words = ["--nproc-per-node", str(nproc), "t.py"]
    assert plan(folder, *words, cores=cores).environment["OMP_NUM_THREADS"] == threads
    assert "OMP_NUM_THREADS" not in plan(folder, *words, environ={"OMP_NUM_THREADS": "5"}).environment
    asked = plan(folder, "--num-cpu-threads", "6", *words, environ={"OMP_NUM_THREADS": "5"})
    assert asked.environment["OMP_NUM_THREADS"] == "6"


def test_one_node_meets_on_a_port_that_the_system_chooses(folder: Path) -> None:
    one, two = plan(folder, "t.py"), plan(folder, "t.py")
    assert (one.rdzv_backend, one.rdzv_endpoint) == ("c10d", "localhost:0")
    assert one.rdzv_id != two.rdzv_id


def test_a_job_that_may_restart_does_not_meet_in_the_store_of_the_attempt_before(folder: Path) -> None:
    unshared = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert unshared not in plan(folder, "t.py").environment
    assert plan(folder, "--max-restarts", "1", "t.py").environment[unshared] == "1"
    assert plan(folder, "--nnodes", "1:2", "--rdzv-endpoint", "host:1", "t.py").environment[unshared] == "1"


def test_several_nodes(folder: Path) -> None:
    words = ["--nnodes", "2:4", "--rdzv-endpoint", "host:1", "--rdzv-conf", "timeout=9,read_timeout=3"]
    found = plan(folder, *words, "--node-rank", "1", "t.py")
    assert (found.min_nodes, found.max_nodes, found.rdzv_endpoint) == (2, 4, "host:1")
    assert found.rdzv_conf == {"timeout": "9", "read_timeout": "3", "is_host": "0"}
    assert plan(folder, *words, "--node-rank", "0", "t.py").rdzv_conf["is_host"] == "1"
    assert "is_host" not in plan(folder, *words, "t.py").rdzv_conf
    static = plan(folder, *words, "--node-rank", "1", "--rdzv-backend", "static", "t.py")
    assert static.rdzv_conf["rank"] == 1


def test_flags_reach_the_processes_with_absolute_paths(folder: Path) -> None:
    (folder / "c.toml").touch()
    found = plan(folder, "--config", "c.toml", "--seed", "3", "t.py")
    flags = json.loads(found.environment["ACCELERATOR_LAUNCH_FLAGS"])
    assert flags == {"config": str(folder / "c.toml"), "seed": "3"}


def test_the_command_ends_with_the_script_and_its_arguments(folder: Path) -> None:
    assert plan(folder, "t.py", "--x", "1").command[1:] == ("script", "t.py", "--x", "1")
    assert plan(folder, "-m", "pkg.train", "y").command[1:] == ("module", "pkg.train", "y")


def test_a_module_that_only_a_finder_knows_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools installs what is to be edited: a finder maps the package's name to its folder."""

    class Editable:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            package = folder / "elsewhere" / "__init__.py"
            return importlib.util.spec_from_file_location(name, package) if name == "mapped" else None

    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "elsewhere" / "train.py").touch()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    assert plan(folder, "-m", "mapped.train").command[1:] == ("module", "mapped.train")
    with pytest.raises(LaunchError, match="'gone' is not found"):
        plan(folder, "-m", "mapped.gone")


def test_a_name_without_a_module_of_its_own_is_not_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of a script
    with pytest.raises(LaunchError, match="'__main__' is not found"):
        plan(folder, "-m", "__main__")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "3:2", "t.py"], "nnodes is '3:2' (--nnodes); expected MIN:MAX with MIN <= MAX."),
        (["--nnodes", "2", "t.py"], "rdzv_endpoint is not set, nnodes is '2' (--nnodes) and rdzv_backend is 'c10d'; e"),
        (
            ["--nnodes", "2", "--rdzv-backend", "static", "--rdzv-endpoint", "host:1", "t.py"],
            "node_rank is not set, and rdzv_backend is 'static' (--rdzv-backend); expected --node-rank 0 on one node, ",
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "host:1", "--strategy", "xla", "t.py"],
            "nnodes is '2' (--nnodes) and strategy is 'xla' (--strategy), which trains in one process on one machine: ",
        ),
        (["gone.py"], "script is 'gone.py', and "),
        (["pkg"], "script is 'pkg', a folder without a __main__.py; expected the path"),
        (["-m", "pkg.gone"], "module is 'pkg.gone', and 'gone' is not found; expected the name of a module that is "),
        (["-m", ".train"], "module is '.train', and '' is not found; expected the name of a module that is installed "),
        (["-m", "gone.train"], "module is 'gone.train', and 'gone' is not found; expected the name of a module that "),
        (
            ["--rdzv-backend", "static", "--max-restarts", "1", "t.py"],
            "max_restarts is 1 (--max-restarts) and rdzv_backend is 'static' (--rdzv-backend); expected 'c10d' with ",
        ),
    ],
)
def test_what_cannot_be_started(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        plan(folder, *words)
    assert str(caught.value).startswith(message)
