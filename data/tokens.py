"""Token files on disk: written, checked, and cut into the batches of each step.

A dataset is a folder with train.bin and val.bin: raw little-endian uint16 ids, no header (uint32
where the vocabulary exceeds 65,536), beside the meta.pkl of data/tokenizer.py. nanoGPT reads and
writes the same files.
"""

import hashlib
import math
import mmap
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import accumulate

import numpy as np
import torch

from data.tokenizer import GPT2, at_hand, bytes_per_id, make_tokenizer
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


class TokenFile:
    """The ids of one split, memory-mapped. Raises UserError if they cannot be trained on."""

    def __init__(self, path, meta, block_size):
        self.path, self.meta, dtype = path, meta, id_dtype(meta)
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


class StepSizes:
    """How many sequences and tokens a step has, over all ranks."""

    def __init__(self, config):
        self.config, self.block_size = config, config["block_size"]
        self.sequences = config["batch_size"] * config["gradient_accumulation_steps"]  # all grown
        ramp = range(min(config["batch_ramp_iters"], config["max_iters"] + 1))
        self.growing = [0, *accumulate(map(self.sequences_at, ramp))]  # sequences before each step

    def sequences_at(self, step):
        """Return the number of sequences of `step`: it grows linearly, then stays.

        Early gradients agree, so that few sequences suffice (GPT-3, arXiv:2005.14165, appendix B).
        """
        ramp, start = self.config["batch_ramp_iters"], self.config["batch_ramp_start"]
        if step >= ramp:
            return self.sequences
        first = start * self.sequences
        return max(1, math.ceil(first + (self.sequences - first) * step / ramp))

    def sequences_until(self, step):
        """Return the number of sequences of all steps before `step`."""
        grown = min(step, len(self.growing) - 1)
        return self.growing[grown] + (step - grown) * self.sequences

    def tokens_until(self, step):
        """Return the number of tokens of all steps before `step`."""
        return self.sequences_until(step) * self.block_size


class Batches(StepSizes):
    """The training sequences of each step, for one rank, prepared one step ahead in a thread.

    The windows of step s are a function of (seed, s), whatever ran before and however many
    processes share them, in the order of their ranks: equally, or to within one sequence while
    their number grows. `sampling` says which they are: "random", each drawn by itself; or "epochs",
    each window once per epoch, in an order drawn anew.
    """

    def __init__(self, tokens, config, runtime):
        super().__init__(config)
        self.tokens, self.runtime = tokens, runtime
        world_size, first, most = runtime.world_size, self.sequences_at(0), self.sequences
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

    def starts(self, step):
        """Return where the sequences of `step` begin in the file, for all ranks."""
        seed, size, count = self.config["seed"], len(self.tokens.ids), self.sequences_at(step)
        if self.config["sampling"] == "epochs":
            first = self.sequences_until(step)
            return in_epochs(np.arange(first, first + count), size, self.block_size, seed)
        return np.random.default_rng([seed, step]).integers(size - self.block_size, size=count)

    def draw(self, step):
        sequences, world_size = self.sequences_at(step), self.runtime.world_size
        shares = np.array_split(self.starts(step), world_size)
        windows = self.tokens.windows(shares[self.runtime.rank], self.block_size + 1)
        if self.runtime.device.type == "cuda":
            torch.cuda.set_device(self.runtime.device)  # a new thread starts on device 0
            windows = windows.pin_memory()  # makes the copy to the device asynchronous
        # As many micro-batches on every rank, for sharded weights want them all, and none is empty.
        needed = -(-sequences // (world_size * self.config["batch_size"]))  # rounded up
        return windows.tensor_split(min(needed, len(shares[-1])))


# --- each window once ----------------------------------------------------------------------------


def in_epochs(numbers, size, block_size, seed):
    """Return where the windows called `numbers` (N) begin in `size` ids.

    An epoch has each window once, in an order of its own. They lie side by side, and where the
    first begins is drawn too, so that each epoch cuts the text elsewhere.
    """
    count = max(1, (size - block_size) // block_size)  # windows that fit wherever the first begins
    starts = np.empty_like(numbers)
    for epoch in np.unique(numbers // count):
        mine = numbers // count == epoch
        generator = np.random.default_rng([seed, epoch, 1])  # the 1: apart from a step's
        offset = generator.integers(min(block_size, size - count * block_size))
        keys = generator.integers(2**63, size=6, dtype=np.uint64)
        starts[mine] = offset + permute(numbers[mine] % count, count, keys) * block_size
    return starts


def permute(numbers, size, keys):
    """Return where a permutation of 0 to size - 1, drawn by `keys`, puts `numbers` (N).

    A Feistel network permutes the numbers below the next power of 4, and what comes out beyond size
    goes in again (Black and Rogaway 2002, section 3), so that no table of the order is needed.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = numbers.astype(np.uint64)
    beyond = np.ones(len(numbers), dtype=bool)
    while beyond.any():
        left, right = result[beyond] >> half, result[beyond] & low
        for key in keys:
            left, right = right, left ^ (scramble(right + key) & low)
        result[beyond] = left << half | right
        beyond = result >= size
    return result.astype(np.int64)


def scramble(x):
    """Return 64 bits that look drawn anew for each of `x` (splitmix64, Steele et al. 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
