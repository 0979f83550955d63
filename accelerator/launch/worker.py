"""The first lines of every launched process: run the script as Python would, and report its error once per job.

Started as a file, `python worker.py script|module TARGET ARGUMENTS...`, and made of the standard library alone,
so that a script does not pay for it. An uncaught exception goes to the error file that torch's elastic agent
names, in the agent's format. The first process of a node that fails by its own fault prints its traceback at
once; one that fails because a peer went away leaves printing to the launcher.
"""

import sys

# Before any other import: this file's directory must not shadow modules.
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

# Only what a script that does not fail needs; the rest is imported in the functions below.
import builtins
import io
import os
import types

REQUEUE = 75  # a script that saved because it is to end, and asks to be started again later (EX_TEMPFAIL)
LAUNCHER = "ACCELERATOR_LAUNCHER_PID"  # who starts this process, and may have ended before its first line

# What torch says in a RuntimeError when the other end of a connection died.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "Socket Timeout",
)


def is_follow_up(error: BaseException) -> bool:
    """Whether this error, or one that led to it, only says that another process went away."""
    seen: BaseException | None = error
    while seen is not None:
        lost = any(kind.__name__ == "PeerLostError" for kind in type(seen).__mro__)
        if lost or (isinstance(seen, RuntimeError) and any(words in str(seen) for words in PEER_LOST)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def script_frames(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames of this file and of runpy."""
    import runpy

    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def format_error(error: BaseException) -> str:
    """What the process's own exception hook prints, so that one set by the script is still called."""
    import contextlib

    error.__traceback__ = script_frames(error.__traceback__)
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        sys.excepthook(type(error), error, error.__traceback__)
    return text.getvalue()


def record(path: str, error: BaseException, text: str, follow_up: bool) -> bool:
    """Write the error file. Returns whether this process is to print: it is the first of its node to fail by itself."""
    import json
    import time

    summary = f"{type(error).__name__}: {error}"
    now = time.time_ns()
    extra = {"py_callstack": text, "timestamp": str(now // 10**9), "timestamp_ns": now, "follow_up": follow_up}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": summary, "extraInfo": extra}}, file)
    if follow_up:
        return False
    attempt = os.path.dirname(os.path.dirname(path))  # <attempt>/<local rank>/error.json
    try:
        os.close(os.open(os.path.join(attempt, "printed"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def report(error: BaseException) -> None:
    """Record the error and, if this process is the one to do so, print it."""
    follow_up = is_follow_up(error)
    text = format_error(error)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or record(path, error, text, follow_up):
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        sys.stderr.write(f"rank {rank} of {size} failed:\n{text}")
        sys.stderr.flush()


def run_script(path: str) -> None:
    """Run a file as `__main__`, which stays in place afterwards: what the script pickles must be found there."""
    if not path.endswith(".py"):
        import runpy

        runpy.run_path(path, run_name="__main__")  # knows directories, archives and compiled files
        return
    name = os.path.abspath(path)
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(__file__=name, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main_module
    with io.open_code(name) as file:
        code = compile(file.read(), name, "exec", dont_inherit=True)
    exec(code, main_module.__dict__)


def leave_mark(name: str) -> bool:
    """Write a file with this process's id for the launcher, beside the error file. Returns whether there is one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    with open(os.path.join(os.path.dirname(path), name), "w") as file:
        file.write(str(os.getpid()))
    return True


def end_with_the_launcher() -> None:
    """Kill this process once the one that started it has ended, were it by `kill -9`: nobody else would.

    Else it would train and save on beside the job that takes its place. It is killed and not asked, since a handler
    would save once more. The launcher ends its processes itself whenever it can.
    """
    import threading

    launcher = int(os.environ.pop(LAUNCHER, os.getppid()))

    def watch() -> None:
        import select
        import signal
        import time

        try:
            process = os.pidfd_open(launcher)  # of the process: one by `prctl` would be of the thread that started us
        except (AttributeError, OSError):  # no Linux, an old one, or gone already
            while os.getppid() == launcher:
                time.sleep(1)
        else:
            while os.getppid() == launcher:
                select.select([process], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher's end", daemon=True).start()


def write_whole_lines() -> None:
    """Have `print` write a line and its end at once: unbuffered, lines of several processes run into each other."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def main() -> None:
    """Become the script: its `sys.argv`, its `sys.path`, its `__main__`."""
    write_whole_lines()
    if leave_mark("pid"):
        end_with_the_launcher()
    how, target = sys.argv[1:3]
    del sys.argv[:2]
    folder = os.getcwd() if how == "module" else os.path.dirname(os.path.realpath(target))
    if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)
    try:
        if how == "module":
            import runpy

            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            run_script(target)
    except SystemExit as leaving:
        if leaving.code == REQUEUE and leave_mark("requeue"):
            raise SystemExit(0) from None  # else torch's agent would take it for a failure, and start it again
        raise
    except BaseException as error:
        report(error)
        # 130 is what a shell reports for a process that an interrupt ended.
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


if __name__ == "__main__":
    main()
