"""The command line of `accelerator launch`, derived from the settings; what follows the script is the script's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from accelerator.config.layers import flag_of
from accelerator.config.settings import catalogue
from accelerator.config.values import describe
from strategies.errors import LaunchError, nearest

USAGE = (
    "accelerator launch [flags] script.py [arguments of the script]\n       accelerator launch [flags] -m module [...]"
)
CONFIG_HELP = "file to read instead of accelerator.toml in the project directory"
MODULE_HELP = "the script is the name of a module, as in python -m"


@dataclass(frozen=True)
class Request:
    """A command line taken apart: `flags` by dotted setting name (and `config`), as text, not yet validated."""

    target: str = ""
    is_module: bool = False
    arguments: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    wants_help: bool = False


def flag_names() -> dict[str, str]:
    """Every flag that takes a value, with the dotted name of its setting."""
    return {flag_of(name): name for name in (*catalogue(), "config")}


def parse(argv: Sequence[str]) -> Request:
    """Take the words after `accelerator launch` apart.

    `--nproc_per_node` is read as `--nproc-per-node`, as torchrun does. Raises `LaunchError` for an unknown
    flag, a flag without its value, or no script.
    """
    names, flags, is_module = flag_names(), dict[str, str](), False
    words = list(argv)
    while words and words[0].startswith("-") and words[0] != "--":
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in ("-h", "--help"):
            return Request(wants_help=True)
        if flag in ("-m", "--module") and not equals:
            is_module = True
            continue
        if flag not in names:
            options = [*names, "--module", "--help"]
            raise LaunchError(
                f"{word} is not a flag of accelerator launch.{nearest(flag, options)} "
                "Flags of the script come after the script; accelerator launch --help lists the others."
            )
        if not equals and _is_switch(names[flag]):
            value = "true"
        elif not equals and not words:
            raise LaunchError(f"{flag} has no value; expected {flag} VALUE before the script.")
        elif not equals:
            value = words.pop(0)
        flags[names[flag]] = value
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        what = "module" if is_module else "script"
        raise LaunchError(f"no {what} was named; expected {USAGE}")
    return Request(target=words[0], is_module=is_module, arguments=tuple(words[1:]), flags=flags)


def _is_switch(name: str) -> bool:
    return name in catalogue() and catalogue()[name][1] is bool


def help_text() -> str:
    """What `accelerator launch --help` prints."""
    rows = [
        *_rows(),
        ("--config FILE", CONFIG_HELP),
        ("-m, --module", MODULE_HELP),
        ("-h, --help", "show this text"),
    ]
    width = max(len(flag) for flag, _ in rows) + 2
    lines = "\n".join(f"  {flag:<{width}}{words}" for flag, words in rows)
    about = "Start a script in several processes. Every flag but the last three is also a key of accelerator.toml."
    return f"usage: {USAGE}\n\n{about}\n\n{lines}"


def _rows() -> Iterator[tuple[str, str]]:
    for name, (item, hint) in sorted(catalogue().items(), key=lambda row: "." not in row[0]):
        choices = [str(option) for option in get_args(hint) if isinstance(option, str)]
        value = "|".join(choices) or {"an integer": "N", "text": "TEXT"}.get(
            describe(hint).removesuffix(" or none"), ""
        )
        default = f" (default: {item.default})" if item.default not in (None, "", False) else ""
        yield f"{flag_of(name)} {value}".rstrip(), item.metadata["help"] + default
