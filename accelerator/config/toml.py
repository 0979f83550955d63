"""Reading a TOML file, and finding the line on which a key stands, which no TOML reader tells."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from strategies.errors import ConfigurationError

WORD = r"""(?:"[^"]*"|'[^']*'|[\w-]+)"""
HEADER = re.compile(rf"\s*\[\s*({WORD}(?:\s*\.\s*{WORD})*)\s*\]")
KEY = re.compile(rf"\s*({WORD}(?:\s*\.\s*{WORD})*)\s*=")


def read_toml(path: Path, shown: str) -> tuple[dict[str, object], str]:
    """The parsed table and the text of `path`; `shown` is its name in errors."""
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as error:
        raise ConfigurationError(f"{shown} cannot be read: {error.strerror}. Expected a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{shown} is not valid TOML: {error}. Correct it there.") from error


def line_of(text: str, keys: tuple[str, ...]) -> int | None:
    """The number of the line that sets `keys`, from 1; `None` for a spelling that this search does not know."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := HEADER.match(line):
            table = _words(header[1])
            if table == keys:
                return number
        elif key := KEY.match(line):
            path = table + _words(key[1])
            if path[: len(keys)] == keys or keys[: len(path)] == path:
                return number
    return None


def _words(dotted: str) -> tuple[str, ...]:
    return tuple(word.strip("\"'") for word in re.findall(WORD, dotted))
