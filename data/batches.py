"""What each step reads: how many sequences, which windows of the token files, and by which rank."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch

from engine.process import UserError


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

    def tokens_at(self, step):
        """Return the number of tokens of `step`."""
        return self.sequences_at(step) * self.block_size

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
        """Return this rank's micro-batches of `step`, each (<= batch_size, block_size + 1) ids.

        While the number of sequences grows, one of them may have a sequence more.
        """
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
