"""Token files on disk: written, checked, and read in windows.

A dataset is a folder with train.bin and val.bin: raw little-endian uint16 ids, no header (uint32
where the vocabulary exceeds 65,536), beside the meta.pkl of data/tokenizer.py. nanoGPT reads and
writes the same files. A split may also be cut into train_0000.bin, train_0001.bin and so on, which
are read as one sequence: `cat train_*.bin > train.bin` gives the same tokens.
"""

import hashlib
import mmap
import pickle
import re
from bisect import bisect_left, bisect_right
from contextlib import ExitStack, suppress
from itertools import accumulate

import numpy as np
import torch

from data.tokenizer import GPT2, at_hand, bytes_per_id, make_tokenizer, read_meta
from engine.process import UserError, atomic, user_error

SCAN_BYTES = 2**27  # files up to this size are searched whole for ids beyond the vocabulary
SAMPLE = 2**16  # bytes of each piece of a file that goes into its digest


def write_dataset(folder, meta, **splits):
    """Write a dataset encoded as `meta` says: each split is an iterable of lists of ids.

    The lists go to the disk as they come, and the files get their names when all of them are whole.
    """
    with user_error(folder, OSError), ExitStack() as files:
        folder.mkdir(parents=True, exist_ok=True)
        if meta != GPT2:
            pickle.dump(meta, files.enter_context(atomic(folder / "meta.pkl")))
        for split, lists in splits.items():
            file = files.enter_context(atomic(folder / f"{split}.bin"))
            for ids in lists:
                file.write(np.asarray(ids, id_dtype(meta)).tobytes())
    if meta == GPT2:
        (folder / "meta.pkl").unlink(missing_ok=True)  # an earlier dataset's
    for path in (folder / f"{split}.bin" for split in splits):
        for older in numbered(path):
            older.unlink()
        print(f"{path}: {path.stat().st_size // id_dtype(meta).itemsize:,} tokens")


def id_dtype(meta):
    return np.dtype("<u2" if meta["vocab_size"] <= 65536 else "<u4")


def check_vocabulary(dataset, meta, vocab_size):
    """Raise UserError unless a model of `vocab_size` can be trained on a dataset of this meta."""
    is_gpt2 = meta == GPT2 and vocab_size >= 50257  # whose files may name the padded size
    if meta["vocab_size"] != vocab_size and not is_gpt2:
        raise UserError(
            f"dataset {dataset} has a vocabulary of {meta['vocab_size']}, the model {vocab_size}; "
            f"prepare the dataset with the model's tokenizer"
        )


def open_dataset(folder, block_size):
    """Return the two splits of the dataset in `folder`, a dict of TokenFile."""
    meta = read_meta(folder)
    return {name: TokenFile(folder / f"{name}.bin", meta, block_size) for name in ("train", "val")}


def files_of(path):
    """Return the files of a split: the one at `path`, or those beside it with numbers.

    Raises UserError where both are there, or a number is missing.
    """
    found = numbered(path)
    expected = [path.with_name(f"{path.stem}_{number:04}.bin") for number in range(len(found))]
    for each in expected:
        if each not in found:
            raise UserError(f"{path.parent} lacks {each.name} but has a later one; copy it again")
    if found and path.exists():
        raise UserError(f"{path.parent} has {path.name} and {expected[0].name}; remove one of them")
    return expected or [path]


def numbered(path):
    """Return the files beside `path` that are called like it, with an underscore and a number."""
    name = re.compile(rf"{re.escape(path.stem)}_\d+\.bin")
    return [each for each in path.parent.glob("*.bin") if name.fullmatch(each.name)]


def map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Joined:
    """Arrays of several files as one sequence: its length, and slices of it, which are arrays."""

    def __init__(self, parts):
        self.parts = parts
        *self.begins, self.size = accumulate(map(len, parts), initial=0)

    def __len__(self):
        return self.size

    def __getitem__(self, where):
        begin, end, _ = where.indices(self.size)
        first = bisect_right(self.begins, begin) - 1
        last = max(first + 1, bisect_left(self.begins, end))
        parts = zip(self.begins[first:last], self.parts[first:last], strict=True)
        found = [part[max(0, begin - at) : end - at] for at, part in parts]
        return found[0] if len(found) == 1 else np.concatenate(found)


class TokenFile:
    """The ids of one split, memory-mapped. Raises UserError if they cannot be trained on."""

    def __init__(self, path, meta, block_size):
        self.meta, dtype, files = meta, id_dtype(meta), files_of(path)
        self.path = path if files == [path] else path.with_name(f"{path.stem}_*.bin")
        if not files[0].exists():
            if (path.parent / "unfinished").exists():
                raise UserError(f"{path.parent} is half prepared; start its preparation again")
            own = f"data/text/prepare.py --input=FILE --dataset={path.parent.name}"
            command = f"{path.parent}/prepare.py" if (path.parent / "prepare.py").exists() else own
            raise UserError(f"no {path.name} in {path.parent}; make it: python {command}")
        sizes = [file.stat().st_size for file in files]
        count = sum(size // dtype.itemsize for size in sizes)
        rest = sum(size % dtype.itemsize for size in sizes)
        if rest or count <= block_size:
            raise UserError(
                f"{self.path} holds {count} tokens and {rest} bytes; "
                f"block_size={block_size} needs {block_size + 1} tokens, all of them whole"
            )
        self.mappings = [map_file(file) for file, size in zip(files, sizes, strict=True) if size]
        self.ids = Joined([np.frombuffer(mapping, dtype) for mapping in self.mappings])
        self.limit(meta["vocab_size"])

    def limit(self, vocab_size):
        """Require every id to be below `vocab_size`: now in a small file, else batch by batch."""
        self.vocab_size = vocab_size
        self.large = len(self.ids) * id_dtype(self.meta).itemsize > SCAN_BYTES
        self.check(self.ids[: 1 if self.large else None])

    def check(self, ids):
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.path} holds id {ids.max()}, the vocabulary {self.vocab_size}")

    def digest(self):
        """Return the number of tokens and a SHA-256 of 64 pieces, spread evenly, of the bytes.

        It tells one file from another without reading a large one whole: 4 MiB at most.
        """
        content = Joined([np.frombuffer(mapping, "u1") for mapping in self.mappings])
        found = hashlib.sha256()
        for index in range(64):
            begin = (len(content) - SAMPLE) * index // 63
            found.update(content[max(0, begin) : max(0, begin) + SAMPLE])
        return f"{len(self.ids)} tokens, SHA-256 {found.hexdigest()[:16]}"

    def bytes_per_token(self):
        """Return the mean bytes of text that an id stands for, of the first 16M ids.

        None where that is not known: the tokenizer cannot be made, or not without a download.
        """
        if not at_hand(self.meta):
            return None
        ids = self.ids[: 2**24]
        self.check(ids)
        with suppress(UserError):
            lengths = bytes_per_id(make_tokenizer(self.meta), self.vocab_size)
            return float(np.array(lengths, np.int32)[ids].mean())

    def evenly_spaced(self, block_size, most):
        """Return where the windows to evaluate on begin: all that do not overlap, or `most`."""
        windows = (len(self.ids) - 1) // block_size
        count = min(windows, most)
        return np.arange(count) * windows // count * block_size

    def windows(self, starts, length):
        """Return the (len(starts), length) ids that begin at `starts`; for `send`.

        They are as wide as on disk, and signed: torch has few operators for unsigned ones.
        """
        if len(self.ids.parts) == 1:  # one gather
            windows = np.lib.stride_tricks.sliding_window_view(self.ids.parts[0], length)[starts]
        else:
            windows = np.stack([self.ids[start : start + length] for start in starts])
        self.check(windows)
        if self.large and hasattr(mmap, "MADV_DONTNEED"):  # else all pages count as our memory
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(windows.view(f"<i{windows.itemsize}"))


def send(ids, device):
    """Return ids of TokenFile.windows as int64 on `device`. They travel as narrow as on disk."""
    ids = ids.to(device, non_blocking=ids.is_pinned())  # other memory may be gone too soon
    return ids.long() & (2 ** (8 * ids.element_size()) - 1)
