"""What becomes of one key of a foreign configuration: settings of ours, nothing that is needed, or a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from strategies.errors import ConfigurationError

Kind = Literal["converted", "not needed", "no equivalent"]


@dataclass(frozen=True)
class Document:
    """A parsed configuration, with what several of its keys together say.

    `kind` is its `distributed_type`, `strategy` the name of ours, `None` where there is none for it.
    """

    name: str
    table: Mapping[str, Any]
    kind: str
    strategy: str | None
    machines: int
    fsdp: Mapping[str, Any]
    parallelism: Mapping[str, Any]

    @property
    def fsdp_version(self) -> int:
        """1 or 2; Accelerate takes 1 where the file says nothing."""
        return version("fsdp_version", self.fsdp.get("fsdp_version", 1))

    @property
    def is_on_xla(self) -> bool:
        """Whether `xla: true` turns FSDP into the one of torch_xla."""
        asked = self.fsdp.get("xla", self.table.get("xla"))
        return self.kind in ("XLA", "TPU") or (asked is not None and switch("xla", asked))


@dataclass(frozen=True)
class Outcome:
    """`values` by dotted name are what a key was converted into; `words` say why, or what to know."""

    kind: Kind
    words: str = ""
    values: Mapping[str, object] = field(default_factory=dict)


Rule = Callable[[Any, Document], Outcome]


def becomes(name: str, value: object, words: str = "") -> Outcome:
    """One setting of ours."""
    return Outcome("converted", words, {name: value})


def needless(words: str) -> Outcome:
    """Nothing to write: what was asked happens anyway, or nothing was asked."""
    return Outcome("not needed", words)


def lost(words: str) -> Outcome:
    """What was asked does not exist here."""
    return Outcome("no equivalent", words)


def always(outcome: Outcome) -> Rule:
    """The same for every value."""
    return lambda value, document: outcome


def is_off(value: object) -> bool:
    """Whether a value asks for nothing."""
    return value in (None, False, 0, "", [], {}) or (
        isinstance(value, str) and value.lower() in ("no", "none", "false", "0")
    )


def lost_if_asked(words: str, *plain: object) -> Rule:
    """A loss, unless the value asks for nothing, or is one of `plain`, which is what happens without the key."""

    def rule(value: Any, document: Document) -> Outcome:
        return needless("asks for nothing") if is_off(value) or value in plain else lost(words)

    return rule


def switch(key: str, value: Any) -> bool:
    """`true`, `"true"` and 1 alike: files of different ages write all of them."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = words.get(str(value).lower())
    if found is None:
        raise ConfigurationError(f"{key} is {value!r}; expected true or false")
    return found


def number(key: str, value: Any) -> int:
    """An integer, also as text. Raises `ConfigurationError` for anything else."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or isinstance(value, bool) or (isinstance(value, float) and value != found):
        raise ConfigurationError(f"{key} is {value!r}; expected an integer")
    return found


def version(key: str, value: Any) -> int:
    """1 or 2, of FSDP."""
    found: int = choice(key, value, {"1": 1, "2": 2})
    return found


def choice(key: str, value: Any, options: Mapping[str, object]) -> Any:
    """What `options` has for the text of `value`, whatever its case."""
    by_upper_case = {option.upper(): found for option, found in options.items()}
    if str(value).upper() not in by_upper_case:
        raise ConfigurationError(f"{key} is {value!r}; expected one of {', '.join(options)}")
    return by_upper_case[str(value).upper()]
