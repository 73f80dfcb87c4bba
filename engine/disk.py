"""How a checkpoint lies on a disk: files that may be damaged, folders that are replaced whole.

A folder called ckpt.dcp is written as ckpt.dcp.new, a name that is never read. Once it is whole and
synced, the older one becomes ckpt.dcp.old and the new one ckpt.dcp. A kill at any moment leaves a
whole one called ckpt.dcp or ckpt.dcp.old.
"""

import os
import shutil
import zipfile
from contextlib import contextmanager

import torch

from engine.process import UserError, reason, sync_folder

# --- replacing -----------------------------------------------------------------------------------


def beside(path, word):
    """Return the path of ckpt.dcp.new or ckpt.dcp.old for that of ckpt.dcp."""
    return path.with_name(f"{path.name}.{word}")


def put(new, path):
    """Give the whole and synced folder `new` the name `path`, in place of what was called so."""
    old = beside(path, "old")
    if path.exists():
        remove(old)
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    remove(old)


def remove(path):
    """Remove a file, or a folder so that no half of it is ever read; either may be missing."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    garbage = path if path.suffix == ".new" else beside(path, "new")
    if garbage != path:
        shutil.rmtree(garbage, ignore_errors=True)  # of a removal that did not end
    os.replace(path, garbage)
    shutil.rmtree(garbage)


def recover(path):
    """Put right what a kill left of the folder `path`. Only the owner of the run may call it."""
    if ".dcp" not in path.name:  # a ckpt.pt.old is somebody's own
        return
    remove(beside(path, "new"))
    old = beside(path, "old")
    if path.exists():
        remove(old)
    elif old.exists():
        os.replace(old, path)


def existing(path):
    """Return the path of the checkpoint that is called `path` as a file: that, or its folder."""
    folder = path.with_suffix(".dcp")
    return folder if folder.exists() and not path.exists() else path


@contextmanager
def os_errors():
    """Raise the OSError that torch.save hides behind an error of its own."""
    try:
        yield
    except RuntimeError as fault:
        if isinstance(fault.__context__, OSError):
            raise fault.__context__ from None
        raise


# --- reading -------------------------------------------------------------------------------------


def read_file(path):
    """Return what torch.save wrote to the file at `path`, plain data and tensors; runs no code.

    Tensors lie on the CPU and are read from the file when they are first used.
    """
    damaged = zipfile.ZipFile(path).testzip()  # 0.35 s per GB; torch.load ignores checksums
    if damaged:
        raise UserError(f"{damaged!r} in it is damaged")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


@contextmanager
def reading(path):
    """Turn what damage raises in the block into a UserError on the checkpoint at `path`.

    It names another folder beside it, if any.
    """
    others = [other.name for other in path.parent.glob("*.dcp") if other.name != path.name]
    hint = f"; --checkpoint_file={others[0]} takes another" if others else ""
    try:
        yield
    except zipfile.BadZipFile:
        why = "it was cut short or is another kind of file"
        raise UserError(f"{path} cannot be read as a checkpoint: {why}{hint}") from None
    except Exception as fault:  # damage can raise anything, but it runs nothing
        raise UserError(f"{path} cannot be read as a checkpoint: {reason(fault)}{hint}") from None


def missing_parts(saved):
    """Return the names of what a checkpoint must hold and this one does not, in the right type."""
    needed = {"model": dict, "model_args": dict, "iter_num": int, "config": dict}
    optional = dict.fromkeys(("optimizer", "scaler", "tokenizer", "data", "watch"), dict)
    lacks = [key for key, kind in needed.items() if not isinstance(saved.get(key), kind)]
    lacks += [key for key, kind in optional.items() if not isinstance(saved.get(key, {}), kind)]
    return lacks


def check_files(path, table):
    """Raise OSError unless the folder `path` has the files in `table`, as long as they were.

    The table is that of engine/sharded.py.
    """
    ends = {}
    for _, _, pieces in table.values():
        for _, _, (file, offset, length) in pieces:
            ends[file] = max(ends.get(file, 0), offset + length)
    for file, end in ends.items():
        if os.path.basename(file) != file or not (path / file).is_file():
            raise OSError(f"{file} is not in it; all machines must share out_dir")
        if os.path.getsize(path / file) != end:
            raise OSError(f"{file} in it was cut short")
