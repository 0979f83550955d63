"""`accelerator config`: write a configuration, show the one that applies here, or convert one of Accelerate."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strategies.errors import ConfigurationError

ABOUT = """Write accelerator.toml: asks what matters, with what was found on this machine as default.
`accelerator config show` prints the values that apply here with their origins.
`accelerator config convert FILE` reads a YAML of Hugging Face Accelerate."""


def main(argv: Sequence[str]) -> int:
    """Run `accelerator config` with these words after it."""
    words = list(argv)
    commands = {"show": _show, "convert": _convert}
    try:
        return commands[words[0]](words[1:]) if words and words[0] in commands else _write(words)
    except SystemExit as ended:  # argparse has said what was wrong
        return 2 if ended.code else 0


def _write(words: Sequence[str]) -> int:
    from accelerator.config.layers import flag_of
    from accelerator.config.settings import catalogue
    from accelerator.configure import ask, detect, render, save

    parser = argparse.ArgumentParser(
        prog="accelerator config", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--yes", action="store_true", help="take what was detected, and ask nothing")
    _add_target(parser)
    for name, (item, hint) in catalogue().items():
        shown = item.metadata["help"]
        parser.add_argument(flag_of(name), dest=name, metavar="VALUE", help=shown, **_switch(hint))
    asked = vars(parser.parse_args(words))
    given = {name: asked[name] for name in catalogue() if asked[name] is not None}
    _refuse_existing(asked["output"], asked["overwrite"])
    values = ask(given, detect(os.environ), take_defaults=asked["yes"])
    save(render(values), Path(asked["output"]).absolute(), overwrite=asked["overwrite"])
    print(f"wrote {asked['output']}: " + ", ".join(f"{name} = {value}" for name, value in values.items()))
    return 0


def _switch(hint: object) -> dict[str, Any]:
    """A switch may be given without a value."""
    return {"nargs": "?", "const": "true"} if hint is bool else {}


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="accelerator.toml", metavar="PATH", help="the file to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _refuse_existing(output: str, overwrite: bool) -> None:
    """Before any question is answered in vain; `save` looks again."""
    if Path(output).exists() and not overwrite:
        raise ConfigurationError(f"{output} is there already. Give --overwrite to replace it, or --output for another.")


def _show(words: Sequence[str]) -> int:
    from accelerator.config import resolve_settings
    from accelerator.configure import table_of

    parser = argparse.ArgumentParser(prog="accelerator config show", description="Print every setting with its origin.")
    parser.add_argument("--config", metavar="FILE", help="file to read instead of accelerator.toml")
    asked = parser.parse_args(words)
    resolved = resolve_settings({}, config=asked.config, environ=dict(os.environ), directory=Path.cwd())
    print(table_of(resolved))
    return 0


def _convert(words: Sequence[str]) -> int:
    from accelerator.configure import convert, render, save

    parser = argparse.ArgumentParser(
        prog="accelerator config convert", description="Write accelerator.toml from a YAML of Hugging Face Accelerate."
    )
    parser.add_argument("file", help="for one ~/.cache/huggingface/accelerate/default_config.yaml")
    _add_target(parser)
    asked = parser.parse_args(words)
    try:
        text = Path(asked.file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{asked.file} cannot be read: {error}. Expected a YAML of Accelerate.") from error
    conversion = convert(text, asked.file)
    notes = [f"Converted from {asked.file}."]
    notes += [f"Without equivalent: {fate.key} = {fate.value!r}: {fate.outcome.words}" for fate in conversion.losses]
    save(render(conversion.values, notes), Path(asked.output).absolute(), overwrite=asked.overwrite)
    print(conversion)
    print(f"wrote {asked.output}; {len(conversion.losses)} of {len(conversion.fates)} keys have no equivalent")
    return 0
