"""The tree keeps its shape: imports one way, honest exports, budgets, no hidden state, no questions to a strategy."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import architecture
from architecture import Source, sources

ROOT = Path(__file__).resolve().parent.parent
MODULES = sources(ROOT, ["accelerator", "strategies"])
CLASSES = architecture.strategy_classes(MODULES)


def named(module: Source) -> str:
    return module.name


# --- the tree -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [architecture.upward_imports, architecture.imports_between_rooms, architecture.import_cycles]
)
def test_imports_point_one_way(rule: Callable[[list[Source]], list[str]]) -> None:
    assert rule(MODULES) == []


@pytest.mark.parametrize("package", [module for module in MODULES if module.is_package], ids=named)
def test_all_is_what_is_importable(package: Source) -> None:
    assert architecture.wrong_exports(importlib.import_module(package.name)) == []


@pytest.mark.parametrize("module", [module for module in MODULES if "__main__" not in module.name], ids=named)
def test_everything_public_says_what_it_is_for(module: Source) -> None:
    assert architecture.missing_docstrings(importlib.import_module(module.name)) == []


@pytest.mark.parametrize("module", sources(ROOT, ["accelerator", "strategies", "examples", "tests"]), ids=named)
def test_sizes_keep_to_their_budgets(module: Source) -> None:
    assert architecture.oversized(module) == []


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_modules_hold_no_mutable_state(module: Source) -> None:
    assert architecture.mutable_module_state(module) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.name.startswith("accelerator")], ids=named)
def test_nothing_asks_which_strategy_it_holds(module: Source) -> None:
    assert architecture.questions_to_a_strategy(module, CLASSES) == []


def test_the_top_of_the_repository_is_as_agreed() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert architecture.strangers(listed.stdout.splitlines()) == []


# --- each rule can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        Source("strategies.ddp", "from accelerator.config import Settings"),
        Source("strategies.ddp", "def wrap():\n    import accelerator"),
        Source("accelerator.launch.agent", "from accelerator.accelerator import Accelerator"),
        Source("accelerator.launch.agent", "from ..accelerator import Accelerator"),
        Source("accelerator.launch.agent", "from .. import Accelerator"),
    ],
)
def test_an_import_upward_is_found(module: Source) -> None:
    assert len(architecture.upward_imports([module])) == 1


@pytest.mark.parametrize(
    "text",
    ["import strategies.world", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import accelerator"],
)
def test_imports_downward_or_for_types_only_are_fine(text: str) -> None:
    assert architecture.upward_imports([Source("strategies.ddp", text)]) == []


ROOMS = [
    Source(f"accelerator.{room}", "", is_package=True) for room in ("launch", "config", "checkpoint", "cli", "trackers")
]


@pytest.mark.parametrize(
    ("text", "importer", "violations"),
    [
        ("from accelerator.checkpoint import save", "accelerator.launch.agent", 1),
        ("from ..checkpoint.manifest import digest", "accelerator.launch.agent", 1),
        ("from .. import checkpoint", "accelerator.launch.agent", 1),
        ("from ..trackers import Tracker", "accelerator.cli.main", 1),
        ("from ..checkpoint import offline", "accelerator.cli.main", 0),
        ("from ..launch import launch", "accelerator.cli.main", 0),
        ("from .ports import free_port", "accelerator.launch.agent", 0),
        ("from .launch import launch", "accelerator.accelerator", 0),
    ],
)
def test_an_import_between_rooms_is_found(text: str, importer: str, violations: int) -> None:
    assert len(architecture.imports_between_rooms([*ROOMS, Source(importer, text)])) == violations


def test_a_cycle_is_found_also_through_a_function() -> None:
    one = Source("strategies.one", "from .two import b")
    two = Source("strategies.two", "def f():\n    from strategies import one")
    assert architecture.import_cycles([Source("strategies", "", is_package=True), one, two]) == [
        "strategies.one <- strategies.two <- strategies.one"
    ]
    assert architecture.import_cycles([one, Source("strategies.two", "b = 1")]) == []


@pytest.fixture
def module_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Make a module named `sample` of a text."""

    def make(text: str) -> ModuleType:
        module = ModuleType("sample")
        monkeypatch.setitem(sys.modules, "sample", module)
        exec(text, module.__dict__)
        return module

    return make


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("__all__ = ['a']\na = 1\nb = 2", "sample: b is public and not in __all__"),
        ("__all__ = ['a', 'c']\na = 1", "sample: c is in __all__ and cannot be imported"),
        ("from pathlib import Path", "sample: Path is public and not in __all__"),
    ],
)
def test_a_wrong_export_is_found(module_of: Callable[[str], ModuleType], text: str, violation: str) -> None:
    assert architecture.wrong_exports(module_of(text)) == [violation]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("x = 1", "sample"),
        ("'''Doc.'''\ndef f(): pass", "sample.f"),
        ("'''Doc.'''\nclass C: pass", "sample.C"),
        ("'''Doc.'''\nclass C:\n    '''Doc.'''\n    def m(self): pass", "sample.C.m"),
        ("'''Doc.'''\nclass C:\n    '''Doc.'''\n    @property\n    def p(self): pass", "sample.C.p"),
        ("'''Doc.'''\nfrom dataclasses import dataclass\n@dataclass\nclass D:\n    x: int", "sample.D"),
    ],
)
def test_a_missing_docstring_is_found(module_of: Callable[[str], ModuleType], text: str, missing: str) -> None:
    assert architecture.missing_docstrings(module_of(text)) == [f"{missing} has no docstring"]


def test_a_docstring_may_be_inherited(module_of: Callable[[str], ModuleType]) -> None:
    text = (
        "'''D.'''\nclass A:\n    '''D.'''\n    def m(self): '''D.'''\nclass B(A):\n    '''D.'''\n    def m(self): pass"
    )
    assert architecture.missing_docstrings(module_of(text)) == []


LONG = "def f():\n" + "    x = 1\n" * 64
MANY = "class Accelerator:\n" + "".join(f"    def m{i}(self): self.a{i} = 1\n" for i in range(23))


@pytest.mark.parametrize(
    ("module", "violations"),
    [
        (Source("strategies.ddp", "x = 1\n" * 401), 1),
        (Source("strategies.ddp", "x = 1\n" * 400), 0),
        (Source(architecture.FACADE, "x = 1\n" * 501), 1),
        (Source(architecture.FACADE, "x = 1\n" * 500), 0),
        (Source("strategies.ddp", LONG), 1),
        (Source("strategies.ddp", LONG.replace("x = 1", "'''Doc\n    string.'''", 1)), 0),
        (Source(architecture.FACADE, MANY), 1),
        (Source(architecture.FACADE, MANY.replace("self.a22", "self._a22")), 0),
    ],
)
def test_something_too_large_is_found(module: Source, violations: int) -> None:
    assert len(architecture.oversized(module)) == violations


@pytest.mark.parametrize(
    "text",
    [
        "count = 0\ndef f():\n    global count\n    count += 1",
        "cache = {}\ndef f(key):\n    cache[key] = 1",
        "cache: dict[str, int] = dict()\ndef f(key):\n    del cache[key]",
        "hooks = []\ndef f(hook):\n    hooks.append(hook)",
        "import weakref\nseen = weakref.WeakSet()\ndef f(x):\n    seen.add(x)",
        "names = {'a'}\ndef f(more):\n    names.update(more)",
    ],
)
def test_mutable_state_is_found(text: str) -> None:
    assert len(architecture.mutable_module_state(Source("strategies.ddp", text))) == 1


def test_a_table_that_is_only_read_is_fine() -> None:
    assert architecture.mutable_module_state(Source("strategies.ddp", "table = {1: 2}\nprint(table[1])")) == []


def test_subclasses_of_subclasses_are_strategies() -> None:
    text = "class DDP(Strategy): ...\nclass Mine(ddp.DDP): ...\nclass Other: ..."
    assert architecture.strategy_classes([Source("strategies.ddp", text)]) == {"DDP", "Mine"}


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(self.strategy, DDP)",
        "isinstance(x, (int, strategies.ddp.DDP))",
        "issubclass(cls, DDP)",
        "self._strategy.name == 'ddp'",
        "hasattr(strategy, 'mesh')",
        "getattr(self.strategy, 'mesh', None)",
        "type(strategy) is CPU",
        "strategy.__class__",
    ],
)
def test_a_question_to_a_strategy_is_found(text: str) -> None:
    assert len(architecture.questions_to_a_strategy(Source(architecture.FACADE, text), frozenset({"DDP"}))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(value, Strategy)",
        "type(strategy).__name__",
        "strategy.wrap(model)",
        "parameter.name",
        "getattr(strategy, field.name)",
    ],
)
def test_using_a_strategy_is_no_question(text: str) -> None:
    assert architecture.questions_to_a_strategy(Source(architecture.FACADE, text), frozenset({"DDP"})) == []


def test_a_stranger_at_the_top_is_found() -> None:
    paths = ["README.md", "scripts/check.sh", "strategies/ddp.py", ".gitignore", ".ci/run", "setup.py"]
    assert architecture.strangers(paths) == ["scripts", "setup.py"]
