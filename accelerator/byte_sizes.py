"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re

from strategies.errors import ConfigurationError

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


def number_of_bytes(size: int | str, name: str) -> int:
    """`size` in bytes: itself, or a text such as `"5GB"` or `"500MiB"`. Raises `ConfigurationError` for others."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?|[KMGT]iB)\s*", str(size), re.IGNORECASE)
    unit = found[2].upper() if found else ""
    unit = unit if unit in _UNITS else unit + "B"
    if found is None or isinstance(size, int):
        raise ConfigurationError(f"{name} is {size!r}; expected a number of bytes or a text such as '5GB' or '500MiB'")
    return int(float(found[1]) * _UNITS[unit])


def in_words(num_bytes: float) -> str:
    """A number of bytes for people, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
