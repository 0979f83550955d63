"""`accelerator launch`: hand the command line and this process's environment to the launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run `accelerator launch` with these words after it."""
    from accelerator.launch import help_text, launch, parse

    request = parse(argv)
    if request.wants_help:
        print(help_text())
        return 0
    return launch(request, environ=dict(os.environ), directory=Path.cwd())
