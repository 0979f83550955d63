"""From names to strategy classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fresh_process import FreshProcesses
from strategies import CPU, DDP, SingleDevice
from strategies.errors import ConfigurationError
from strategies.registry import known_names, resolve


@pytest.mark.parametrize(("name", "kind"), [("cpu", CPU), ("single", SingleDevice), ("ddp", DDP)])
def test_built_in_names(name: str, kind: type) -> None:
    assert resolve(name) is kind
    assert name in known_names()


def test_a_class_by_its_path() -> None:
    assert resolve("strategies.ddp:DDP") is DDP


@pytest.mark.parametrize(
    ("name", "nearest"), [("dpp", "ddp"), ("DDP", "ddp"), ("sinlge", "single"), ("Auto", "auto"), ("cppu", "cpu")]
)
def test_a_typo_is_answered_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"strategy is '{name}'; expected one of auto, .*Did you mean '{nearest}'\?"
    ):
        resolve(name)


def test_an_unknown_name_without_a_near_one_is_answered_with_all() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve("zzzzz")
    assert all(name in str(caught.value) for name in ["auto", *known_names()])
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:Thing", "No module named 'no_such_module'"),
        ("strategies.ddp:Nothing", "has no attribute 'Nothing'"),
        ("strategies.ddp:join", "expected a subclass of Strategy"),
        ("pathlib:Path", "expected a subclass of Strategy"),
        ("strategies.ddp:", "with both parts"),
        (":DDP", "with both parts"),
    ],
)
def test_a_path_that_leads_to_no_strategy_is_refused(path: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        resolve(path)


def test_an_installed_package_registers_its_own(tmp_path: Path, fresh: FreshProcesses) -> None:
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[accelerator.strategies]\ntheirs = their_module:Theirs\n")
    (tmp_path / "their_module.py").write_text("from strategies import CPU\nclass Theirs(CPU): pass\n")
    (tmp_path / "run.py").write_text(
        "from accelerator import Accelerator\nfrom strategies.registry import known_names\n"
        "print(known_names()[-1], type(Accelerator(strategy='theirs').strategy).__name__)\n"
    )
    (finished,) = fresh(tmp_path / "run.py")
    assert finished.stdout.split() == ["theirs", "Theirs"], finished.stderr
