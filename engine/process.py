"""How a process treats its user and its disk: one-line errors, signals, and atomic files.

Imports neither torch nor any other part of the project.
"""

import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

# --- errors --------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user. Each line names the given value, the allowed values and a remedy.

    `one_line_errors` prints it without a traceback. Any other exception is a bug in this project or
    in a change to it, and keeps its traceback.
    """


@contextmanager
def user_error(subject, *kinds):
    """Turn an exception of `kinds` in the block into the UserError `subject: reason`."""
    try:
        yield
    except kinds as fault:
        raise UserError(f"{subject}: {reason(fault)}") from fault


def reason(fault):
    """Return in one line the operating system's message, or the first sentence of the exception."""
    text = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return text.replace(":\n", ": ").splitlines()[0].partition(". ")[0].rstrip(".")


@contextmanager
def one_line_errors(out_of_memory="take a machine with more memory"):
    """Decorate a script's main(config): a mistake of the user becomes one line and exit status 1.

    `out_of_memory` is the script's advice for a model that does not fit. Every rank prints its own
    line, ranks other than 0 with their number.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed by 2>&-
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a sample may hold any character
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or the reader ended: sample.py | head
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as fault:
        lines = explain(fault, out_of_memory).splitlines()
        if not lines:
            raise
        rank = os.environ.get("RANK", "0")
        prefix = f"error: rank {rank}: " if rank != "0" else "error: "
        raise SystemExit("\n".join(prefix + line for line in lines)) from None


def explain(fault, out_of_memory):
    """Return the line that a user should see for an exception, or "" if it is a bug."""
    text = str(fault)
    # A model with NaN weights raises the second, a name that is not UTF-8 the third.
    if isinstance(fault, UserError | FloatingPointError | UnicodeEncodeError):
        return text
    if isinstance(fault, ModuleNotFoundError):
        return f"this needs the package {fault.name}: pip install {fault.name}"
    if isinstance(fault, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return f"out of memory: {out_of_memory}"
    if type(fault).__name__.startswith("Dist") or "gloo" in text:  # such as DistNetworkError
        return f"another process has ended or is out of reach ({reason(fault)}); resume the run"
    if isinstance(fault, OSError):
        return f"{fault.filename}: {reason(fault)}" if fault.filename else reason(fault)
    return ""


# --- signals -------------------------------------------------------------------------------------

STOP_SIGNALS = {getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")}


@contextmanager
def noted_signals():
    """Yield a list to which the block's SIGTERM, SIGINT, SIGHUP and SIGUSR1 are added.

    These signals do not end the process, except a Ctrl-C after another one. Signals that the
    process was started to ignore stay ignored, as SIGHUP under nohup. Only the main thread of a
    process can catch signals.
    """
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = {
        number: signal.signal(number, note)
        for number in STOP_SIGNALS - {None}
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- files ---------------------------------------------------------------------------------------


def user_path(text):
    """Return a path that a user typed, with ~ expanded. UnicodeError if it is not UTF-8."""
    return Path(os.path.expanduser(str(text).encode().decode()))


@contextmanager
def atomic(path):
    """Open a binary file that replaces `path`, complete and synced, if the block succeeds.

    UserError if that is impossible, or if `path` is a folder or a device: /dev/null must stay one.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with user_error(path, OSError), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # exists only after an error
    sync_folder(path.parent)


def link(source, target):
    """Give the file `source` the second name `target`, in place of an older file of that name.

    Makes a copy if the file system has no hard links.
    """
    temporary = target.with_name(f"{target.name}.{os.urandom(4).hex()}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError:  # never write to `temporary`: it may already be a name of the only good file
        with open(source, "rb") as content, atomic(target) as file:
            shutil.copyfileobj(content, file)
    finally:
        temporary.unlink(missing_ok=True)  # exists if source and target were one file before


def sync_folder(folder):
    """Write the names in `folder` to the disk, because a power cut could undo a rename.

    Ignores errors: the rename is done, and some file systems cannot sync a folder.
    """
    with suppress(OSError):  # Windows too
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
