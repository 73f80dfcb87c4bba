"""How a process behaves towards its user and its disk: errors, signals, files, the terminal."""

import importlib
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial, wraps
from pathlib import Path

# --- errors --------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user: one line for each fault, saying what is wrong and what to do.

    `one_line_errors` shows only these without a traceback. Every other exception is a bug, ours or
    that of someone who changed the code, and keeps it.
    """


@contextmanager
def user_error(what, *kinds):
    """Turn an exception of `kinds` in the block into the UserError `what: reason`."""
    try:
        yield
    except kinds as fault:
        raise UserError(f"{what}: {reason(fault)}") from fault


def reason(fault):
    """Return why, in one line: what the system says, or the first sentence of an exception."""
    if isinstance(fault, UserError):
        return str(fault)
    if getattr(fault, "strerror", None):
        return fault.strerror
    text = f"{type(fault).__name__}: {fault}".splitlines()[0].partition(". ")[0]
    return text.removeprefix("ValueError: ")


def import_extra(module, extra):
    """Return the module, which an extra of the project installs; UserError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {module}: pip install -e '.[{extra}]'") from None


at_end = []  # functions that undo what main() did to the process


def one_line_errors(main):
    """Decorate a script's main(config): a UserError ends it with a line per fault and status 1.

    Ranks that fail alike speak once. However it ends, the functions in `at_end` are called, and the
    process group is left.
    """

    @wraps(main)
    def guarded(config):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a sample may hold any character
        try:
            return main(config)
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as fault:
            text = explain(fault, config)
            if text is None:
                raise
            if isinstance(fault, UserError) and is_said_by_another_rank(text):
                raise SystemExit(1) from None
            rank = int(os.environ.get("RANK", 0))
            prefix = f"error: rank {rank}: " if rank else "error: "
            raise SystemExit("\n".join(prefix + line for line in text.splitlines())) from None
        finally:
            while at_end:
                undo = at_end.pop()
                undo()
            leave_process_group()

    return guarded


def explain(fault, config):
    """Return what a user can do about an exception, or None where it is a bug."""
    text = str(fault)
    if isinstance(fault, UserError | FloatingPointError):  # the second from a broken model
        return text
    phrases = "can't allocate memory", "MPS backend out of memory"
    named = type(fault).__name__ in ("OutOfMemoryError", "MemoryError")  # CUDA's, Python's
    if named or any(phrase in text for phrase in phrases):
        taken = getattr(config, "memory", "")  # of engine/size.py, once the model is built
        return f"out of memory: {taken}{'; ' if taken else ''}{memory_advice(config)}"
    if text.startswith("Error(s) in loading state_dict"):
        return f"the weights do not fit the model: {' '.join(text.split())[:300]}"
    kinds = {kind.__name__ for kind in type(fault).__mro__}
    if "DistError" in kinds or "gloo" in text:
        why = text.splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        return f"another process is gone or out of reach ({why}); --init_from=resume goes on"


def memory_advice(config):
    """Return which of these settings to change where memory runs out."""
    if config.get("prompts") or ("max_new_tokens" in config and config["num_samples"] > 1):
        return f"lower --batch_size, now {config['batch_size']}, the most samples side by side"
    if config.get("new_tokens") and config["num_samples"] > 1:
        return f"lower --num_samples, now {config['num_samples']}"
    if "max_new_tokens" in config or config.get("new_tokens"):  # of sample.py or bench.py
        return "take a smaller model, or a machine with more"
    batch_size = config.get("batch_size", 1)
    if batch_size > 1 and batch_size % 2 == 0:
        steps = 2 * config["gradient_accumulation_steps"]
        half = f"--batch_size={batch_size // 2} --gradient_accumulation_steps={steps}"
        return f"try {half}, which trains alike"
    if batch_size > 1:
        return f"lower --batch_size, now {batch_size}"
    if not config.get("activation_checkpointing", True):
        return "try --activation_checkpointing=True, then a smaller --block_size"
    return "take a smaller model or context, or a machine with more"


# --- processes that torchrun started together ----------------------------------------------------


@cache
def shared_store(timeout):
    """Return the key-value store that torchrun's processes share; it answers within `timeout` s.

    Raises DistNetworkError where the machine that keeps it has ended.
    """
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # else it meets old keys
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return dist.PrefixStore(f"attempt {attempt}", store)


def is_said_by_another_rank(text):
    """Return whether another rank printed this error; rank 0 has a second to speak for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    with suppress(Exception):  # the machine that keeps the store may have ended
        if os.environ["RANK"] != "0":
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # Where nobody answers, TCPStore would log a stack trace.
            socket.create_connection(address, timeout=5).close()
        store = shared_store(timeout=5)
        tries = 0 if os.environ["RANK"] == "0" else 10
        while tries and not store.check([text]):
            time.sleep(0.1)  # wait() would log its own timeout
            tries -= 1
        return store.add(text, 1) > 1
    return False


def leave_process_group():
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo may still hold the last tensor. To free it, it needs the interpreter, and
        # aborts the process where that has ended: "terminate called without an active exception".
        time.sleep(0.1)


# --- signals -------------------------------------------------------------------------------------

_caught = []  # numbers of the signals that came


def catch_signals():
    """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 only set `caught_signal`; a second SIGINT kills.

    SIGHUP, the terminal is gone, stays ignored under nohup.
    """

    def note(number, frame):
        _caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    _caught.clear()
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has not all of them
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            before = signal.signal(number, note)
            at_end.append(partial(signal.signal, number, before))


def caught_signal():
    """Return the number of a signal that came since catch_signals(), else 0."""
    return max(_caught, default=0)


# --- files ---------------------------------------------------------------------------------------


def user_path(text):
    """Return the path a user typed, ~ expanded; UserError where there is no such home."""
    with user_error(str(text), RuntimeError):
        return Path(text).expanduser()


def check_writable(folder, setting="out_dir"):
    """Raise UserError unless files can be written to `folder`, which need not exist yet."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"{setting}={folder}: {place} is not a folder that can be written to")


@contextmanager
def atomic(path):
    """Open a file that appears at `path`, synced to the disk, only if the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there only after an error
    sync_folder(path.parent)


def sync_folder(folder):
    """Write the list of names in `folder` to the disk: else a power cut may undo a rename."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def link(path, name):
    """Let the file at `path` also be called `name`, in place of what was called so."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # costs no room and no time
        os.replace(temporary, name)
        sync_folder(name.parent)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic(name) as target:
            shutil.copyfileobj(source, target)
