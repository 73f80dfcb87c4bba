"""Token files on disk: written, checked, cut into batches; and the tokenizers that made them.

A dataset is a folder with train.bin and val.bin: raw little-endian uint16 ids, no header (uint32
where the vocabulary exceeds 65,536). meta.pkl holds the vocabulary size and what decodes the ids;
a folder without one holds GPT-2 BPE. nanoGPT reads and writes the same files.
"""

import hashlib
import mmap
import os
import pickle
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import torch

from engine.process import UserError, atomic, reason, user_error

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed
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
        print(f"{path}: {path.stat().st_size // id_dtype(meta).itemsize:,} tokens")


def id_dtype(meta):
    return np.dtype("<u2" if meta["vocab_size"] <= 65536 else "<u4")


class PlainUnpickler(pickle._Unpickler):  # the C one takes gigabytes for a damaged memo index
    def find_class(self, module, name):  # called for all but numbers, strings and containers
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def read_meta(folder):
    """Return what tells how the dataset in `folder` was encoded: its meta.pkl, or GPT2."""
    path = folder / "meta.pkl"
    if not path.exists():
        return GPT2
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] < 2**32:
            raise UserError(f"its vocab_size is {meta['vocab_size']!r}")
        if "stoi" in meta:
            CharTokenizer(meta)
        return meta
    except Exception as fault:  # garbage can raise anything, but it runs nothing
        why = reason(fault)
        raise UserError(f"{path} describes no dataset ({why}); prepare it again") from None


class TokenFile:
    """The ids of one split, memory-mapped. Raises UserError if they cannot be trained on."""

    def __init__(self, path, meta, block_size):
        self.path, dtype = path, id_dtype(meta)
        if not path.exists():
            own = f"data/text/prepare.py --input=FILE --dataset={path.parent.name}"
            command = f"{path.parent}/prepare.py" if (path.parent / "prepare.py").exists() else own
            raise UserError(f"no {path.name} in {path.parent}; make it: python {command}")
        count, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest or count <= block_size:
            raise UserError(
                f"{path} holds {count} tokens and {rest} bytes; "
                f"block_size={block_size} needs {block_size + 1} tokens, all of them whole"
            )
        with open(path, "rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(self.mapping, dtype)
        self.limit(meta["vocab_size"])

    def limit(self, vocab_size):
        """Require every id to be below `vocab_size`: now in a small file, else batch by batch."""
        self.vocab_size = vocab_size
        self.large = self.ids.nbytes > SCAN_BYTES
        self.check(self.ids[:1] if self.large else self.ids)

    def check(self, ids):
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.path} holds id {ids.max()}, the vocabulary {self.vocab_size}")

    def digest(self):
        """Return the number of tokens and a SHA-256 of 64 pieces, spread evenly, of the bytes.

        It tells one file from another without reading a large one whole: 4 MiB at most.
        """
        content, found = memoryview(self.mapping), hashlib.sha256()
        for index in range(64):
            begin = (len(content) - SAMPLE) * index // 63
            found.update(content[max(0, begin) : max(0, begin) + SAMPLE])
        return f"{len(self.ids)} tokens, SHA-256 {found.hexdigest()[:16]}"

    def evenly_spaced(self, block_size, most):
        """Return where the windows to evaluate on begin: all that do not overlap, or `most`."""
        windows = (len(self.ids) - 1) // block_size
        count = min(windows, most)
        return np.arange(count) * windows // count * block_size

    def windows(self, starts, length):
        """Return the (len(starts), length) ids that begin at `starts`, in one gather; for `send`.

        They are as wide as on disk, and signed: torch has few operators for unsigned ones.
        """
        windows = np.lib.stride_tricks.sliding_window_view(self.ids, length)[starts]
        self.check(windows)
        if self.large and hasattr(mmap, "MADV_DONTNEED"):  # else all pages count as our memory
            self.mapping.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(windows.view(f"<i{windows.itemsize}"))


def send(ids, device):
    """Return ids of TokenFile.windows as int64 on `device`. They travel as narrow as on disk."""
    ids = ids.to(device, non_blocking=ids.is_pinned())  # other memory may be gone too soon
    return ids.long() & (2 ** (8 * ids.element_size()) - 1)


class Batches:
    """The training sequences of each step, for one rank, prepared one step ahead in a thread.

    The sequences_at(s) windows of step s are drawn by a generator keyed by (seed, s), whatever ran
    before and however many processes share them, in the order of their ranks: equally, or to within
    one sequence while their number grows.
    """

    def __init__(self, tokens, sequences_at, batch_size, block_size, seed, runtime):
        self.tokens, self.length, self.batch_size = tokens, block_size + 1, batch_size
        self.sequences_at, self.seed, self.runtime = sequences_at, seed, runtime
        world_size, first, most = runtime.world_size, sequences_at(0), sequences_at(2**31)
        fits = [n for n in range(1, min(2 * world_size, first + 1)) if most % n == 0]
        if world_size not in fits:
            raise UserError(
                f"batch_size * gradient_accumulation_steps = {most} sequences per step "
                f"divide among {', '.join(map(str, fits))} processes, not among {world_size}"
                + (f": the first step has only {first}" if first < world_size else "")
            )
        self.pool, self.ahead = ThreadPoolExecutor(max_workers=1), {}  # ahead: step -> future

    def __call__(self, step):
        """Return this rank's micro-batches of `step`, each (<= batch_size, block_size + 1) ids."""
        if step not in self.ahead:
            self.ahead[step] = self.pool.submit(self.draw, step)
        future = self.ahead[step]
        self.ahead = {step + 1: self.pool.submit(self.draw, step + 1)}
        return future.result()

    def draw(self, step):
        sequences, world_size = self.sequences_at(step), self.runtime.world_size
        starts = np.random.default_rng([self.seed, step]).integers(
            len(self.tokens.ids) - self.length + 1, size=sequences
        )
        shares = np.array_split(starts, world_size)
        windows = self.tokens.windows(shares[self.runtime.rank], self.length)
        if self.runtime.device.type == "cuda":
            torch.cuda.set_device(self.runtime.device)  # a new thread starts on device 0
            windows = windows.pin_memory()  # makes the copy to the device asynchronous
        # As many micro-batches on every rank, for sharded weights want them all, and none is empty.
        needed = -(-sequences // (world_size * self.batch_size))  # rounded up
        return windows.tensor_split(min(needed, len(shares[-1])))


def char_meta(characters):
    """Return the meta of a dataset of these characters."""
    itos = dict(enumerate(sorted(set(characters))))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


class CharTokenizer:
    """One id per character, as the tables of `meta` say. UserError if they disagree."""

    def __init__(self, meta):
        self.stoi, self.itos = meta["stoi"], meta["itos"]
        self.vocab_size, self.eot = meta["vocab_size"], None  # no end-of-text token
        self.opening = self.stoi.get("\n", 0)  # what an empty prompt begins with
        inverse = {i: c for c, i in self.stoi.items() if isinstance(c, str)}
        if self.itos != inverse or sorted(inverse) != list(range(self.vocab_size)):
            raise UserError("its characters and ids do not match")

    def encode(self, text):
        if unknown := sorted(set(text) - self.stoi.keys()):
            names = ", ".join(f"{c!r} ({unicodedata.name(c, 'unnamed')})" for c in unknown[:8])
            raise UserError(f"{len(unknown)} unknown characters: {names}")
        return [self.stoi[character] for character in text]

    def encode_corpus(self, texts):
        return map(self.encode, texts)

    def decode_bytes(self, ids):
        return "".join(self.itos[i] for i in ids).encode()


class BPETokenizer:
    """The tiktoken encoding that `meta` names."""

    def __init__(self, meta):
        import tiktoken  # here, because characters need neither it nor its files

        try:
            self.encoding = tiktoken.get_encoding(meta["tokenizer"])
        except (OSError, ValueError) as fault:  # no network, no such encoding
            why = str(fault).partition("\n")[0].partition("(")[0]
            raise UserError(
                f"no tokenizer {meta['tokenizer']}: {why}; offline, set TIKTOKEN_CACHE_DIR to a "
                f"folder that tiktoken filled elsewhere"
            ) from None
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.opening = self.eot

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special=())

    def encode_corpus(self, texts, threads=None):
        """Yield an array of ids for each text, made on all cores; special tokens are plain text."""
        encode, cores = self.encoding.encode_to_numpy, threads or os.cpu_count()
        with ThreadPoolExecutor(cores) as pool:
            waiting = deque()
            for text in texts:
                waiting.append(pool.submit(encode, text, disallowed_special=()))
                if len(waiting) > 4 * cores:  # however large the corpus
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def decode_bytes(self, ids):
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError:  # newer encodings leave some ids unused
            return b""


def make_tokenizer(meta):
    """Return the tokenizer that `meta`, of a dataset or a checkpoint, describes."""
    if not meta.keys() & {"tokenizer", "stoi"}:
        raise UserError("meta.pkl names no tokenizer and holds no characters")
    return BPETokenizer(meta) if "tokenizer" in meta else CharTokenizer(meta)
