"""Every exception this library raises on purpose.

    AcceleratorError
    ├── ConfigurationError      a setting is unknown, of the wrong type, or contradicts another
    ├── PrepareError            an object given to `prepare` cannot be prepared
    ├── StepError               the loop asked for something the step cannot do correctly
    │   └── NonfiniteError      a NaN or an infinity appeared, with `detect_nonfinite`
    ├── DataError               a dataloader cannot be sharded, or ranks disagree about it
    ├── StateError              saved weights or a checkpoint do not fit, or cannot be read or written
    │   └── ReplicasDifferError ranks hold different copies of a tensor
    ├── CollectiveError         a collective cannot give a right answer
    │   ├── ShapeMismatchError  ranks brought tensors of different shapes or dtypes
    │   └── PeerLostError       another rank died or left
    ├── LaunchError             processes cannot be started as asked
    └── ConformanceError        a strategy breaks a promise of the contract

Catch `AcceleratorError` for all of them. Messages say what came, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AcceleratorError(Exception):
    """Base of every exception raised on purpose by this library."""


class ConfigurationError(AcceleratorError, ValueError):
    """A setting is unknown, has the wrong type or value, or contradicts another one."""


class PrepareError(AcceleratorError, ValueError):
    """An object given to `prepare` is unknown, was prepared before, or does not belong with the others."""


class StepError(AcceleratorError, RuntimeError):
    """`backward`, `step` or `accumulate` was used in a way that would change the mathematics."""


class NonfiniteError(StepError):
    """A NaN or an infinity appeared in forward, backward or update. Only with `detect_nonfinite`; on every rank."""


class DataError(AcceleratorError, RuntimeError):
    """A dataloader cannot be sharded as asked, is empty, or was iterated differently on different ranks."""


class StateError(AcceleratorError, RuntimeError):
    """Saved weights do not belong to the model that is to take them, or cannot be written."""


class ReplicasDifferError(StateError):
    """Ranks that should hold copies of one tensor hold different ones; found by `verify_replicas`, on every rank."""


class CollectiveError(AcceleratorError, RuntimeError):
    """A collective operation cannot give a right answer."""


class ShapeMismatchError(CollectiveError):
    """Ranks brought tensors of different structure, shape or dtype to one collective."""


class PeerLostError(CollectiveError):
    """Another rank died, raised, or left the process group while this one waited for it."""


class LaunchError(AcceleratorError, RuntimeError):
    """The processes that were asked for cannot be started, or are not the ones that were found."""


class ConformanceError(AcceleratorError, AssertionError):
    """A strategy breaks a rule of the contract; the message names the rule."""


def listed(names: Sequence[str]) -> str:
    """The names for a message, at most twenty of them."""
    return ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")


def nearest(word: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the option nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
