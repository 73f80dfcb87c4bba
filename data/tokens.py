"""Token files on disk: written, checked, and read in windows.

A dataset is a folder with train.bin and val.bin, which hold little-endian uint16 ids without a
header (uint32 if the vocabulary exceeds 65,536), and the meta.pkl of data/tokenizer.py. nanoGPT
reads and writes the same files.
"""

import hashlib
import os
import pickle
from contextlib import ExitStack, suppress

import numpy as np
import torch

from data.tokenizer import GPT2, read_meta
from engine.checkpoint import lock
from engine.process import UserError, atomic, user_error


def id_dtype(meta):
    return np.dtype("<u2" if meta["vocab_size"] <= 65536 else "<u4")


def write_dataset(folder, meta, **splits):
    """Write a dataset: its `meta`, and each split as an iterable of arrays or lists of ids.

    The ids go to the disk as they come. All files are complete before the first gets its name.
    """
    dtype = id_dtype(meta)
    with ExitStack() as stack:
        stack.enter_context(lock(folder, "wait for it to end"))
        for split, parts in splits.items():
            path = (folder / f"{split}.bin").resolve()  # a link stays, and leads to the new data
            file = stack.enter_context(atomic(path))
            for ids in parts:
                file.write(np.asarray(ids, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
            with suppress(OSError):  # the data matter, also if nobody can read this line
                print(f"{path}: {file.tell() // dtype.itemsize:,} tokens")
        if meta != GPT2:
            pickle.dump(meta, stack.enter_context(atomic(folder / "meta.pkl")))
    if meta == GPT2:
        (folder / "meta.pkl").unlink(missing_ok=True)  # of an earlier dataset


def open_dataset(folder, block_size):
    """Return the two splits of the dataset in `folder`, name -> TokenFile."""
    meta = read_meta(folder)
    return {name: TokenFile(folder / f"{name}.bin", meta, block_size) for name in ("train", "val")}


def check_vocabulary(dataset, meta, vocab_size):
    """Raise UserError unless a model with `vocab_size` tokens can be trained on this dataset."""
    padded = meta == GPT2 and vocab_size >= 50257  # the padding of 50,304 is never in a file
    if meta["vocab_size"] != vocab_size and not padded:
        raise UserError(
            f"dataset {dataset} has a vocabulary of {meta['vocab_size']}, the model {vocab_size}; "
            f"prepare the dataset with the tokenizer of the model"
        )


class TokenFile:
    """The ids of one split, read from disk when they are needed.

    UserError if the file is missing, too short for block_size, or has ids beyond the vocabulary.
    """

    def __init__(self, path, meta, block_size):
        self.path = path
        self.meta = meta
        advice = f"run {path.parent}/prepare.py, or data/text/prepare.py for your own text"
        with user_error(f"{path} ({advice})", OSError, ValueError):
            self.file = os.open(path, os.O_RDONLY)  # stays open: the path may get new data
            self.count = len(self.ids())
        if self.count <= block_size:
            raise UserError(f"{path} has {self.count} tokens, too few for block_size={block_size}")
        self.check_ids(self.ids()[: 2**26])  # the rest is checked when it is read

    def ids(self):
        """Return all ids as a new memory map. A map in long use counts as memory of the process."""
        return np.memmap(open(self.file, "rb", closefd=False), id_dtype(self.meta), mode="r")

    def check_ids(self, ids):
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(
                f"{self.path} contains token id {ids.max()}, but the vocabulary has only "
                f"{self.meta['vocab_size']} tokens; llm.c's files need their header cut off: "
                f"tail -c +1025 OLD > NEW"
            )

    def digest(self):
        """Return the number of tokens and a SHA-256 of 64 pieces of 64 KiB, spread evenly."""
        content = self.ids().view(np.uint8)
        digest = hashlib.sha256()
        last = max(0, len(content) - 2**16)
        for begin in last * np.arange(64) // 63:
            digest.update(content[begin : begin + 2**16])
        return f"{self.count} tokens, SHA-256 {digest.hexdigest()[:16]}"

    def evenly_spaced(self, block_size, maximum):
        """Return the positions of at most `maximum` evaluation windows that do not overlap."""
        windows = (self.count - 1) // block_size
        count = min(windows, maximum)
        return np.arange(count) * windows // count * block_size

    def windows(self, starts, length):
        """Return the ids that begin at `starts` as an int64 tensor (len(starts), length)."""
        windows = np.lib.stride_tricks.sliding_window_view(self.ids(), length)[starts]
        self.check_ids(windows)
        return torch.from_numpy(windows.astype(np.int64))
