"""The configuration of this place, as a table: every setting, its value, and where it came from."""

from __future__ import annotations

from dataclasses import fields

from accelerator.config import Resolved
from accelerator.config.settings import catalogue


def table_of(resolved: Resolved) -> str:
    """A line per setting, then the options of the strategy that is named, or those given for others.

    Raises `ConfigurationError` if the strategy cannot be built from its options.
    """
    settings = resolved.settings
    rows = [("setting", "value", "from")]
    for name in catalogue():
        holder = settings.launch if name.startswith("launch.") else settings
        rows.append((name, _shown(getattr(holder, name.rpartition(".")[2])), resolved.origins[name]))
    if settings.strategy != "auto":
        strategy = resolved.strategy_for(settings.strategy)
        for field in fields(strategy):
            name = f"{settings.strategy}.{field.name}"
            rows.append((name, _shown(getattr(strategy, field.name)), resolved.origins.get(name, "default")))
    for other, options in resolved.options.items():
        if other != settings.strategy:
            rows += [(f"{other}.{key}", _shown(given.value), given.origin) for key, given in options.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value) if value != "" else '""'
