"""Five lines around a PyTorch training loop: one loop, any hardware, the same numbers, or a clear error."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import strategies as _strategies

if _Path(_strategies.__file__ or "").parent.parent != _Path(__file__).parent.parent:
    _found = _strategies.__file__ or list(_strategies.__path__)
    raise ImportError(
        f"`import strategies` found another package at {_found}, in front of the one that comes with torch-accelerator "
        f"in {_Path(__file__).parent.parent}. Rename or uninstall that one, or take its folder off sys.path."
    )

from strategies import CPU, DDP, AcceleratorError, SingleDevice, Strategy

from .accelerator import Accelerator
from .config import NOT_GIVEN

if _TYPE_CHECKING:
    from .batch_size import find_executable_batch_size
    from .ema import EMA
    from .launch import notebook_launcher
    from .local_sgd import LocalSGD

__all__ = [
    "CPU",
    "DDP",
    "EMA",
    "NOT_GIVEN",
    "Accelerator",
    "AcceleratorError",
    "LocalSGD",
    "SingleDevice",
    "Strategy",
    "find_executable_batch_size",
    "notebook_launcher",
]
__version__ = "0.1.0"


_WHERE = {  # what most scripts do not use is imported when it is asked for
    "EMA": "ema",
    "LocalSGD": "local_sgd",
    "find_executable_batch_size": "batch_size",
    "notebook_launcher": "launch",
}


def __getattr__(name: str) -> _Any:
    if name in _WHERE:
        return getattr(_import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
