"""Choose the sequences of each training step and share them among the ranks."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from engine.process import UserError


def sequences_at(steps, config):
    """Return how many sequences each of `steps`, an int or an array, reads over all ranks.

    Their number grows linearly for batch_ramp_iters steps: early gradients agree, so few sequences
    are enough (GPT-3, arXiv:2005.14165, appendix B).
    """
    full = config["batch_size"] * config["gradient_accumulation_steps"]
    ramp = config["batch_ramp_iters"]
    if ramp == 0:
        return full + 0 * steps
    first = config["batch_ramp_start"] * full
    growth = (full - first) * np.minimum(steps, ramp) / ramp
    return np.ceil(first + growth).clip(1, full).astype(int)


def tokens_until(step, config):
    """Return how many tokens the steps before `step` read over all ranks."""
    growing = min(step, config["batch_ramp_iters"])
    sequences = sequences_at(np.arange(growing), config).sum()
    sequences += (step - growing) * sequences_at(step, config)
    return int(sequences) * config["block_size"]


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_starts(seed, epoch, size, block_size):
    """Return the positions in `size` tokens at which the windows of an epoch begin, shuffled.

    The windows do not overlap; the first one begins at a random place in each epoch.
    """
    count = windows_per_epoch(size, block_size)
    generator = np.random.default_rng([seed, epoch, 1])  # the 1 separates it from the steps' seeds
    first = generator.integers(min(block_size, size - count * block_size))
    return first + generator.permutation(count) * block_size


def windows_per_epoch(size, block_size):
    return max(1, size // block_size - 1)


def starts_at(step, size, config):
    """Return the positions in `size` tokens at which the sequences of `step` begin, for all ranks.

    sampling="random" draws each of them independently; "epochs" reads every window of the data
    once before it reads one again.
    """
    seed = config["seed"]
    block_size = config["block_size"]
    count = int(sequences_at(step, config))
    if config["sampling"] == "random":
        generator = np.random.default_rng([seed, step])
        return generator.integers(size - block_size, size=count)
    starts = []
    first = tokens_until(step, config) // block_size
    for number in range(first, first + count):
        epoch, index = divmod(number, windows_per_epoch(size, block_size))
        starts.append(epoch_starts(seed, epoch, size, block_size)[index])
    return np.array(starts)


class Batches:
    """The micro-batches of each step for one rank, prepared one step ahead in a thread.

    The windows of step s are a function of (seed, s). All ranks together read the same windows,
    however many ranks there are.
    """

    def __init__(self, tokens, config, runtime):
        self.tokens = tokens
        self.config = config
        self.runtime = runtime
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.prepared = {}  # step -> future
        ranks = runtime.world_size
        full = config["batch_size"] * config["gradient_accumulation_steps"]
        if full % ranks or sequences_at(0, config) < ranks:
            raise UserError(
                f"{ranks} processes cannot share {full} sequences or less; change "
                f"batch_size, gradient_accumulation_steps or the number of processes"
            )

    def __call__(self, step):
        """Return the micro-batches of `step`, a list of int64 tensors (B, T + 1).

        B is at most batch_size. While the number of sequences grows, ranks may differ by one.
        """
        if step not in self.prepared:
            self.prepared[step] = self.pool.submit(self.read, step)
        batches = self.prepared[step]
        self.prepared = {step + 1: self.pool.submit(self.read, step + 1)}
        return batches.result()

    def read(self, step):
        starts = starts_at(step, self.tokens.count, self.config)
        shares = np.array_split(starts, self.runtime.world_size)
        share = shares[self.runtime.rank]
        windows = self.tokens.windows(share, self.config["block_size"] + 1)
        if self.runtime.device.type == "cuda":
            windows = windows.pin_memory()  # so that copies need not wait
        # Every rank needs the same number of micro-batches, and none of them empty.
        count = math.ceil(len(shares[0]) / self.config["batch_size"])
        return windows.tensor_split(min(count, len(shares[-1])))
