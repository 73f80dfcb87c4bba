"""One process at a time in a folder."""

import os
import socket

from engine.process import UserError, at_end


def lock(folder, advice):
    """Lock `folder` until main() or the process ends; UserError if another process holds it.

    The system frees it however the process ends. Where files cannot be locked, nothing happens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(folder / ".lock", "a+", encoding="utf-8")
    at_end.append(file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200) or "another process"
        raise UserError(f"{folder} is in use by {owner}; {advice}") from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
