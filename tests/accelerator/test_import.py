"""What importing the package does, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

import accelerator
import strategies
from fresh_process import FreshProcesses

LOADED = """
import json, sys, torch, torch.utils.data, torch.nn.parallel
before = set(sys.modules)
import accelerator
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_is_light_and_silent(fresh: FreshProcesses, tmp_path: Path) -> None:
    (finished,) = fresh(LOADED, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".out", ".err")]
    assert written == []  # beside the output that the harness keeps
    packages = json.loads(finished.stdout)
    heavy = ("pydantic", "rich", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo")
    assert [name for name in packages if name.startswith(heavy)] == []


@pytest.mark.parametrize("kind", ["package", "module", "namespace"])
def test_a_foreign_package_in_front_of_ours_is_named(fresh: FreshProcesses, tmp_path: Path, kind: str) -> None:
    foreign = tmp_path / ("strategies.py" if kind == "module" else "strategies")
    if kind == "module":
        foreign.write_text("")
    else:
        foreign.mkdir()
        if kind == "package":
            (foreign / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text("import accelerator\nprint('imported')\n")
    (finished,) = fresh(tmp_path / "script.py")
    if kind == "namespace":  # a folder without __init__.py stands behind every package
        assert finished.stdout == "imported\n", finished.stderr
        return
    assert finished.returncode == 1
    error = finished.stderr.splitlines()[-1]
    assert error.startswith("ImportError: `import strategies` found another package at ")
    assert str(foreign) in error
    assert "Rename or uninstall that one" in error


@pytest.mark.parametrize("package", [accelerator, strategies])
def test_what_is_imported_late_is_listed(package: ModuleType) -> None:
    assert set(package.__all__) <= set(dir(package))
