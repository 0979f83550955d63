"""`python -m accelerator`: the same as the `accelerator` command."""

import sys

from accelerator.cli import main

if __name__ == "__main__":
    sys.exit(main())
