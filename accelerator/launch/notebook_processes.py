"""The other side of `notebook_launcher`: the agent that starts the ranks, and what each rank does.

Started as `python -m accelerator.launch.notebook_processes agent FOLDER FLAGS...`, which starts the same module as
`rank FOLDER` in every process.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import AcceleratorError

from .flags import parse
from .start import launch
from .worker import is_follow_up


def agent(folder: str, flags: Sequence[str]) -> int:
    """Start the ranks and wait for them; end them if the notebook's kernel is gone. Returns the exit code."""
    threading.Thread(target=_end_with_the_kernel, daemon=True).start()
    try:
        request = parse([*flags, "-m", __spec__.name, "rank", folder])
        return launch(request, environ=dict(os.environ), directory=Path.cwd())
    except AcceleratorError as error:
        print(f"notebook_launcher: {error}", file=sys.stderr)
        return 2


def _end_with_the_kernel() -> None:
    sys.stdin.read()  # returns when the kernel closes its end, or dies
    os.kill(os.getpid(), signal.SIGTERM)


def rank(folder: Path) -> None:
    """Call the function, and leave what it returned, or its traceback."""
    import cloudpickle

    number = int(os.environ["RANK"])
    with open(folder / f"ended-{number}", "w") as ended:
        # The agent ends the other ranks when one has failed, most of them inside a collective.
        faulthandler.register(signal.SIGTERM, file=ended, all_threads=False, chain=True)
        call = cloudpickle.loads((folder / "call").read_bytes())
        sys.path += [entry for entry in call["path"] if entry not in sys.path]
        linecache.cache.update(call["cells"])
        try:
            result = cloudpickle.dumps(call["fn"](*call["args"]))
        except Exception as error:
            kind = "follow" if is_follow_up(error) else "error"
            (folder / f"{kind}-{number}").write_text(_traceback(error), encoding="utf-8")
            raise SystemExit(1) from None
        finally:
            faulthandler.unregister(signal.SIGTERM)
    (folder / f"result-{number}").write_bytes(result)


def _traceback(error: BaseException) -> str:
    """The traceback without the frame of this file."""
    error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(error))


if __name__ == "__main__":
    if sys.argv[1] == "agent":
        sys.exit(agent(sys.argv[2], sys.argv[3:]))
    rank(Path(sys.argv[2]))
