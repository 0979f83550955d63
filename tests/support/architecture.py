"""The rules of the source tree, each a function from what it looks at to a list of violations.

Imports, state and size are read from the syntax tree, so a rule also sees code that no test runs; exported
names and docstrings are read from the imported module, so that inherited docstrings count.
"""

from __future__ import annotations
import __future__

import ast
import graphlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

FACADE = "accelerator.accelerator"
MAX_LINES = 400
MAX_LINES_OF_FACADE = 500
MAX_NAMES_OF_FACADE = 45
MAX_LINES_OF_FUNCTION = 64  # the constructor of the facade: two lines for each setting
TOP_LEVEL = frozenset({"pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"}) | {
    *("accelerator", "strategies", "tests", "examples", "docs")
}
# Which rooms of `accelerator` may import which others. The command line ties rooms together; a launcher starts
# what the configuration says.
ROOMS_MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "cli": frozenset({"checkpoint", "launch", "config", "configure", "doctor", "bigmodel", "report"}),
    "doctor": frozenset({"launch", "config"}),
    "configure": frozenset({"config"}),
    "launch": frozenset({"config"}),
}

CONTAINERS = frozenset({
    "dict", "list", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict", "WeakKeyDictionary", "WeakSet"
})  # fmt: skip
MUTATING_METHODS = frozenset({
    "append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add", "discard",
    "appendleft", "difference_update", "intersection_update", "symmetric_difference_update",
})  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One module as text. `name` is dotted; `is_package` marks an `__init__.py`."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        """The syntax tree of the text."""
        return ast.parse(self.text, filename=self.name)


def sources(root: Path, folders: Iterable[str]) -> list[Source]:
    """Every Python file below these folders of `root`, in order of their paths."""
    found = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        found.append(Source(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package))
    return found


# --- imports --------------------------------------------------------------------------------------------------


def imports(source: Source, known: frozenset[str]) -> Iterator[str]:
    """Modules that `source` imports anywhere when it runs; a name is taken for a submodule if `known` has it."""
    for node in _running_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(source, node)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in known else base


def _base_of(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.name.split(".")
    kept = parts[: len(parts) - node.level + source.is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from (other, *_running_nodes(other))
            continue
        yield child
        yield from _running_nodes(child)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def upward_imports(modules: Sequence[Source]) -> list[str]:
    """`strategies` never imports `accelerator`; `accelerator.launch` never imports the facade."""
    known = frozenset(module.name for module in modules)
    found = []
    for module in modules:
        for imported in imports(module, known):
            if _within(module.name, "strategies") and _within(imported, "accelerator"):
                found.append(f"{module.name} imports {imported}, which is above it")
            if _within(module.name, "accelerator.launch") and imported in (FACADE, "accelerator"):
                found.append(f"{module.name} imports the facade")
    return found


def imports_between_rooms(modules: Sequence[Source]) -> list[str]:
    """The sub-packages of `accelerator` do not import each other, but for `ROOMS_MAY_IMPORT`."""
    known = frozenset(module.name for module in modules)
    packages = {module.name for module in modules if module.is_package}
    found = []
    for module in modules:
        room = _room(module.name, packages)
        for imported in imports(module, known) if room else ():
            other = _room(imported, packages)
            if other and other != room and other not in ROOMS_MAY_IMPORT.get(room or "", ()):
                found.append(f"{module.name} imports {imported}: the room {room!r} may not use the room {other!r}")
    return found


def _room(name: str, packages: set[str]) -> str | None:
    parts = name.split(".")
    is_room = parts[0] == "accelerator" and len(parts) > 1 and ".".join(parts[:2]) in packages
    return parts[1] if is_room else None


def import_cycles(modules: Sequence[Source]) -> list[str]:
    """No module imports itself by way of others, be it inside functions."""
    known = frozenset(module.name for module in modules)
    graph = {module.name: {name for name in imports(module, known) if name in known} for module in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


# --- what a package shows -------------------------------------------------------------------------------------


def wrong_exports(package: ModuleType) -> list[str]:
    """`__all__` is exactly the public names that can be imported, submodules aside."""
    exported = set(getattr(package, "__all__", ()))
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and name != "TYPE_CHECKING"
        and not isinstance(value, ModuleType | __future__._Feature)
    }
    return [
        *(f"{package.__name__}: {name} is public and not in __all__" for name in sorted(public - exported)),
        *(
            f"{package.__name__}: {name} is in __all__ and cannot be imported"
            for name in sorted(exported)
            if not hasattr(package, name)
        ),
    ]


def missing_docstrings(module: ModuleType) -> list[str]:
    """The module, and every public class, function and method in it, says what it is for. Methods may inherit that."""
    found = [] if module.__doc__ else [f"{module.__name__} has no docstring"]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) and not value.__doc__:
            found.append(f"{module.__name__}.{name} has no docstring")
        if inspect.isclass(value):
            found += [f"{module.__name__}.{missing} has no docstring" for missing in _undocumented(value)]
    return found


def _undocumented(cls: type) -> Iterator[str]:
    own = vars(cls).get("__doc__") or ""
    if not own or own.startswith(f"{cls.__name__}("):  # a dataclass without a docstring is given its signature
        yield cls.__qualname__
    for name, value in vars(cls).items():
        is_method = isinstance(value, FunctionType | property | classmethod | staticmethod)
        if is_method and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield f"{cls.__qualname__}.{name}"


# --- size -----------------------------------------------------------------------------------------------------


def oversized(source: Source) -> list[str]:
    """The facade, any other file, and a function without its docstring keep to their budgets."""
    found = []
    lines, most = len(source.text.splitlines()), MAX_LINES_OF_FACADE if source.name == FACADE else MAX_LINES
    if lines > most:
        found.append(f"{source.name} has {lines} lines; at most {most}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > MAX_LINES_OF_FUNCTION:
            found.append(f"{source.name}.{node.name} has {_length(node)} lines; at most {MAX_LINES_OF_FUNCTION}")
        if source.name == FACADE and isinstance(node, ast.ClassDef) and node.name == "Accelerator":
            names = _public_names(node)
            if len(names) > MAX_NAMES_OF_FACADE:
                found.append(f"Accelerator has {len(names)} public names; at most {MAX_NAMES_OF_FACADE}")
    return found


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = _lines(function)
    if ast.get_docstring(function) is not None:
        length -= _lines(function.body[0])
    return length


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _public_names(cls: ast.ClassDef) -> set[str]:
    names = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    for node in cls.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= set(_assigned(node))
    return {name for name in names if not name.startswith("_")}


# --- state and questions --------------------------------------------------------------------------------------


def mutable_module_state(source: Source) -> list[str]:
    """No `global`, and no module-level container that the module changes."""
    containers = {
        name
        for node in source.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_container(node.value)
        for name in _assigned(node)
    }
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            found.append(f"{source.name}:{node.lineno} declares {', '.join(node.names)} global")
        for changed in _changed(node):
            if changed in containers:
                found.append(f"{source.name}:{getattr(node, 'lineno', '?')} changes {changed}, a name of the module")
    return found


def _is_container(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in CONTAINERS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def _assigned(node: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return (target.id for target in targets if isinstance(target, ast.Name))


def _changed(node: ast.AST) -> Iterator[str]:
    target: Any = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
        target = node.func.value
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        target = node.value
    elif isinstance(node, ast.AugAssign):
        target = node.target
    if isinstance(target, ast.Name):
        yield target.id


def strategy_classes(modules: Sequence[Source]) -> frozenset[str]:
    """Names of all classes below `Strategy`, which itself is not among them."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found: set[str] = set()
    while more := {name for name, above in bases.items() if above & (found | {"Strategy"})} - found:
        found |= more
    return frozenset(found)


def questions_to_a_strategy(source: Source, classes: frozenset[str]) -> list[str]:
    """Above `strategies`, nothing asks which strategy it holds: where it wants to, a method is missing."""
    found = []
    for node in ast.walk(source.tree):
        asked = _question(node, classes)
        if asked:
            found.append(f"{source.name}:{getattr(node, 'lineno', '?')} asks {asked}")
    return found


def _question(node: ast.AST, classes: frozenset[str]) -> str | None:
    asks = False
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        if node.func.id in ("isinstance", "issubclass"):
            named = {ast.unparse(part).rpartition(".")[2] for part in ast.walk(node.args[1])}
            asks = bool(named & classes)
        elif node.func.id in ("hasattr", "getattr"):
            # `getattr(strategy, field.name)` lists all settings and asks for none.
            for_one = len(node.args) == 3 or isinstance(node.args[1], ast.Constant)
            asks = for_one and _is_strategy(node.args[0])
    elif isinstance(node, ast.Attribute):
        asks = node.attr in ("name", "__class__") and _is_strategy(node.value)
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        asks = any(
            isinstance(side, ast.Call) and ast.unparse(side.func) == "type" and _is_strategy(side.args[0])
            for side in sides
        )
    return ast.unparse(node) if asks else None


def _is_strategy(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).rpartition(".")[2].strip("_") == "strategy"


# --- the repository -------------------------------------------------------------------------------------------


def strangers(paths: Iterable[str]) -> list[str]:
    """Top-level entries of the repository that are not agreed on; names that begin with a dot are free."""
    tops = {path.split("/", 1)[0] for path in paths}
    return sorted(top for top in tops if top not in TOP_LEVEL and not top.startswith("."))
