"""What a run takes: seconds, where the device has been waited for, and memory."""

import math
import sys
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds per step, between points where the device was waited for; pauses do not count."""

    def __init__(self, step, runtime):
        self.runtime, self.step, self.began = runtime, step, runtime.now()

    @contextmanager
    def paused(self):
        began = self.runtime.now()
        yield
        self.began += self.runtime.now() - began

    def lap(self, step):
        """Return seconds per step since the last call, at `step` steps made. Syncs the device."""
        now = self.runtime.now()
        mean = (now - self.began) / (step - self.step)
        self.step, self.began = step, now
        return mean


def time_laps(work, most, limit, runtime):
    """Return seconds per call of work(1), work(2), ..., for `most` calls or `limit` seconds.

    Each is the mean of a lap of up to 10 calls, as between log lines: waiting for the device costs
    little then.
    """
    began, times, index, lap = runtime.now(), [], 1, 1
    # Ranks have clocks of their own and must agree when to stop: the slowest counts.
    while index <= most and runtime.reduce("max", runtime.now() - began) < limit:
        lap_began = runtime.now()
        for _ in range(lap):
            work(index)
            index += 1
        times.append(runtime.reduce("max", runtime.now() - lap_began) / lap)
        lap = max(1, min(10, round(0.1 / times[-1])))
    return times


def peak_memory(runtime):
    """Return the most memory used so far in bytes, of the GPU or else of this process.

    Not a number where the system does not say: Windows.
    """
    if runtime.device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(runtime.device)
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
