"""Token files on disk: written, checked, cut into batches; and the tokenizers that made them.

A dataset is a folder with `train.bin` and `val.bin`, raw little-endian ids without a header: uint16,
or uint32 where the vocabulary exceeds 65,536. `meta.pkl` holds the vocabulary size and what
decodes the ids; a folder without one holds GPT-2 BPE. nanoGPT reads and writes the same files.
"""

import mmap
import os
import pickle
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

GPT2 = {"tokenizer": "gpt2", "vocab_size": 50304}  # 50,257 padded to a multiple of 64 for speed
SCAN_BYTES = 2**27  # files up to this size are searched whole for ids beyond the vocabulary


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is safe only once the folder is on the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_dataset(folder, meta, **splits):
    """Write each split, an iterable of lists of ids, to `folder`/SPLIT.bin, and meta.pkl.

    Ids are streamed to temporary files, renamed only when all of them are complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = id_dtype(meta)
    with ExitStack() as files:
        if meta != GPT2:
            pickle.dump(meta, files.enter_context(atomic(folder / "meta.pkl")))
        for split, lists in splits.items():
            file = files.enter_context(atomic(folder / f"{split}.bin"))
            for ids in lists:
                file.write(np.asarray(ids, dtype).tobytes())
            if not file.tell():
                raise ValueError(f"the {split} split is empty: there is too little text")
    if meta == GPT2:
        (folder / "meta.pkl").unlink(missing_ok=True)  # an earlier dataset's
    counts = {split: (folder / f"{split}.bin").stat().st_size // dtype.itemsize for split in splits}
    print(f"{folder}: " + ", ".join(f"{split} {n:,} tokens" for split, n in counts.items()))


def id_dtype(meta):
    return np.dtype("<u2" if meta["vocab_size"] <= 65536 else "<u4")


class PlainUnpickler(pickle.Unpickler):
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
        if not 0 < meta["vocab_size"] < 2**32:
            raise ValueError(f"vocab_size is {meta['vocab_size']}")
    except Exception as fault:  # garbage can raise anything, but run nothing
        raise ValueError(f"{path} does not describe a dataset ({fault}); prepare it again") from None
    return meta


class TokenFile:
    """The ids of one split, memory-mapped. Raises ValueError if they cannot be trained on."""

    def __init__(self, path, meta, block_size):
        self.path, dtype = path, id_dtype(meta)
        if not path.exists():
            script, own = path.parent / "prepare.py", f"--input=FILE --dataset={path.parent.name}"
            command = os.path.relpath(script) if script.exists() else f"data/text/prepare.py {own}"
            raise ValueError(f"no {path.name} in {path.parent}; make it: python {command}")
        count, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest or count <= block_size:
            found = f"{path} holds {count} tokens of {dtype.itemsize} bytes and {rest} bytes more"
            raise ValueError(f"{found}; block_size={block_size} needs {block_size + 1} or more tokens")
        with open(path, "rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(self.mapping, dtype)
        self.limit(meta["vocab_size"])

    def limit(self, vocab_size):
        """Require every id to be below `vocab_size`: now in a small file, else batch by batch."""
        self.vocab_size, self.large = vocab_size, self.ids.nbytes > SCAN_BYTES
        self.check(self.ids[: 1 if self.large else None])

    def check(self, ids):
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{self.path} holds id {ids.max()}; the vocabulary {self.vocab_size}")

    def windows(self, starts, length):
        """Return the (len(starts), length) int64 ids that begin at `starts`, in one gather."""
        view = np.lib.stride_tricks.sliding_window_view(self.ids, length)
        windows = view[starts].astype(np.int64)
        if self.large:
            self.check(windows)
            if hasattr(mmap, "MADV_DONTNEED"):  # else every page ever read counts as our memory
                self.mapping.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(windows)


class Batches:
    """The training sequences of each step, for one rank, prepared one step ahead in a thread.

    The `sequences` windows of step s are drawn by a generator keyed by (seed, s): they depend
    neither on earlier steps nor on the number of processes, which take equal shares in rank order.
    """

    def __init__(self, tokens, block_size, batch_size, sequences, seed, run):
        self.tokens, self.length, self.batch_size = tokens, block_size + 1, batch_size
        self.sequences, self.seed, self.run = sequences, seed, run
        self.pool, self.ahead = ThreadPoolExecutor(max_workers=1), {}  # ahead: step -> future

    def __call__(self, step):
        """Return this rank's micro-batches of `step`, each (<= batch_size, block_size + 1) ids."""
        future = self.ahead.pop(step, None) or self.pool.submit(self.draw, step)
        self.ahead = {step + 1: self.pool.submit(self.draw, step + 1)}
        return future.result()

    def draw(self, step):
        key = np.random.SeedSequence([self.seed, step])
        bits = np.random.Philox(key).random_raw(self.sequences)  # the same in every numpy
        starts = bits % (len(self.tokens.ids) - self.length + 1)
        share = self.sequences // self.run.world_size
        windows = self.tokens.windows(starts[self.run.rank * share :][:share], self.length)
        if self.run.device.type == "cuda":
            torch.cuda.set_device(self.run.device)  # a new thread starts on device 0
            windows = windows.pin_memory()  # makes the copy to the device asynchronous
        return windows.split(self.batch_size)


def char_meta(characters):
    """Return the meta.pkl of a character-level dataset that knows `characters`."""
    itos = dict(enumerate(sorted(characters)))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


class CharTokenizer:
    """One id per character, as the tables of `meta` say."""

    def __init__(self, meta):
        self.stoi, self.itos, self.vocab_size = meta["stoi"], meta["itos"], meta["vocab_size"]
        self.eot = None  # there is no end-of-text token

    def encode(self, text):
        if unknown := sorted(set(text) - self.stoi.keys()):
            names = ", ".join(f"{c!r} ({unicodedata.name(c, 'unnamed')})" for c in unknown[:8])
            raise ValueError(f"{len(unknown)} unknown characters: {names}")
        return [self.stoi[character] for character in text]

    def encode_corpus(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids):
        return "".join(self.itos[i] for i in ids).encode()


class BPETokenizer:
    """The tiktoken encoding that `meta` names."""

    def __init__(self, meta):
        import tiktoken  # characters need neither it nor its files

        name, known = meta["tokenizer"], ", ".join(tiktoken.list_encoding_names())
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError:  # requests' errors too
            advice = "offline, set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled elsewhere"
            raise ValueError(f"cannot fetch the files of tokenizer {name}; {advice}") from None
        except ValueError:
            raise ValueError(f"no tokenizer {name!r}; choose char, {known}") from None
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def encode_corpus(self, texts):  # special tokens are plain text here; uses all cores
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def make_tokenizer(meta):
    """Return the tokenizer that `meta`, of a dataset or a checkpoint, describes."""
    if "tokenizer" in meta:
        return BPETokenizer(meta)
    if "stoi" in meta:
        return CharTokenizer(meta)
    raise ValueError("meta.pkl names no tokenizer and holds no characters")
